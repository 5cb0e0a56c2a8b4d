//! What the shader compilers of four vendors say of every kernel that their cards may choose: Mesa's, for cards that are not here
//! (`scripts/isa/fetch.sh`). NVK's is not NVIDIA's own and Honeykrisp's not Apple's; what counts are spills and registers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities as Allowed, ValidationFlags, Validator};
use polystage::gpu::{Capabilities, KernelKey, Tiles, source};

use crate::shaders::{card, kernels};

/// A card and the driver that compiles for it.
struct Target {
    name: &'static str,
    driver: &'static str,
    /// What makes the driver see the card, in the order in which it is loaded.
    shims: &'static [&'static str],
    env: [&'static str; 2],
    /// What `polystage::gpu` says that its registers hold.
    sums: u32,
    /// Rows and columns of the cooperative matrices that its driver shows.
    cooperative: u32,
    /// Names of the registers and of what tells how many subgroups run at once.
    registers: &'static str,
    occupancy: &'static str,
    /// Whatever says that registers did not suffice.
    spills: &'static [&'static str],
    /// Cycles that one subgroup takes from its first to its last instruction, as the compiler estimates them.
    cycles: &'static str,
}

const AMD: Target = Target {
    name: "navi31",
    driver: "radeon",
    shims: &["libamdgpu_noop_drm_shim.so"],
    env: ["AMDGPU_GPU_ID", "navi31"],
    sums: 64,
    cooperative: 16,
    registers: "VGPRs",
    occupancy: "Subgroups per SIMD",
    spills: &["Spilled VGPRs", "Spilled SGPRs", "Scratch size"],
    cycles: "Latency",
};
const INTEL: Target = Target {
    name: "A770",
    driver: "intel",
    shims: &["intel.so", "libamdgpu_noop_drm_shim.so"],
    env: ["INTEL_PCI", "56a0"],
    sums: 32,
    // Of 8x16, which WGSL does not have.
    cooperative: 0,
    registers: "GRF registers",
    occupancy: "subgroup",
    spills: &["Spills", "Fills", "Scratch Memory Size"],
    cycles: "Cycles",
};
static TARGETS: [Target; 6] = [
    AMD,
    Target { name: "gfx1201", env: ["AMDGPU_GPU_ID", "gfx1201"], ..AMD },
    Target {
        name: "AD102",
        driver: "nouveau",
        shims: &["libnouveau_noop_drm_shim.so"],
        env: ["NOUVEAU_CHIPSET", "0x192"],
        sums: 64,
        cooperative: 16,
        registers: "Number of GPRs",
        occupancy: "Max warps/SM",
        // What is kept in registers of another kind costs a move.
        spills: &["Spills to memory", "Fills from memory", "SLM size"],
        cycles: "Static cycle count",
    },
    INTEL,
    Target { name: "B580", env: ["INTEL_PCI", "e20b"], ..INTEL },
    Target {
        name: "M1",
        driver: "asahi",
        shims: &["libasahi_noop_drm_shim.so"],
        env: ["POLYSTAGE", "isa"],
        sums: 64,
        // Mesa's driver emulates them.
        cooperative: 0,
        registers: "GPRs",
        occupancy: "Threads",
        spills: &["Spills", "Fills", "Scratch"],
        cycles: "Instructions",
    },
];

/// Where the compilers are, if they are.
fn compilers() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let root = cache.join("polystage/isa");
    root.join("stamp").exists().then_some(root)
}

/// The words that wgpu makes of a kernel for Vulkan where shaders are trusted.
fn spirv(key: &KernelKey) -> Vec<u8> {
    let module = naga::front::wgsl::parse_str(&source(key.name, key.specialisation.header)).unwrap();
    let info = Validator::new(ValidationFlags::all(), Allowed::all()).validate(&module).unwrap();
    let constants = key.specialisation.constants.iter();
    let constants = constants.map(|&(name, value)| (name.to_string(), value as f64)).collect();
    let entry = (naga::ShaderStage::Compute, "main");
    let resolved = naga::back::pipeline_constants::process_overrides(&module, &info, Some(entry), &constants);
    let (module, info) = resolved.unwrap();
    let unchecked = BoundsCheckPolicy::Unchecked;
    let options = spv::Options {
        lang_version: (1, 6),
        capabilities: None,
        bounds_check_policies: BoundsCheckPolicies {
            index: unchecked,
            buffer: unchecked,
            image_load: unchecked,
            binding_array: unchecked,
        },
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        emit_int_div_checks: false,
        ..spv::Options::default()
    };
    let pipeline = spv::PipelineOptions { shader_stage: entry.0, entry_point: entry.1.into() };
    let words = spv::write_vec(&module, &info, &options, Some(&pipeline)).unwrap();
    bytemuck::cast_slice(&words).to_vec()
}

/// Kernel and constants, in which a change of the header is one too.
fn label(key: &KernelKey) -> String {
    let text = source(key.name, key.specialisation.header);
    let header =
        text.split("// Header \"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default();
    let constants: Vec<String> =
        key.specialisation.constants.iter().map(|(name, value)| format!("{name}={value}")).collect();
    [key.name, header, &constants.join(" ")].join(" ").trim().to_string()
}

type Statistics = HashMap<String, f64>;

impl Target {
    /// Every kernel that the card may choose: tiles of every size that it holds, whole and with K split, in f32 and in f16.
    fn chosen(&self) -> impl Iterator<Item = KernelKey> {
        let sums = [16, 32, 64].into_iter().filter(|&sums| sums <= self.sums);
        let full = sums.flat_map(|sums| [1, 3, 256].map(|fill| card(sums, fill)));
        let in_f16 = [1, 3].map(|fill| {
            let (f16, cooperative) = (true, self.cooperative);
            Capabilities { f16, cooperative, ..card(self.sums, fill) }
        });
        let measured = [4, 5].map(|tile| Capabilities { tiles: Tiles([[tile; 3]; 3]), ..card(self.sums, 1) });
        full.chain(in_f16).chain(measured).flat_map(|card| kernels(&card))
    }

    /// What the compiler says of each, by its label.
    fn compile(&self, root: &Path, files: &BTreeMap<String, String>) -> BTreeMap<String, Statistics> {
        let chosen: BTreeSet<String> = self.chosen().map(|key| label(&key)).collect();
        let labels: HashMap<&str, &str> =
            chosen.iter().map(|label| (files[label].as_str(), label.as_str())).collect();
        let libraries = root.join("sid/usr/lib/x86_64-linux-gnu");
        let shims: Vec<String> = self
            .shims
            .iter()
            .map(|name| [root, &libraries].map(|at| at.join(name)).into_iter().find(|path| path.exists()))
            .map(|path| path.unwrap().to_str().unwrap().to_string())
            .collect();
        let manifest = root.join(format!("icd/{}.json", self.driver));
        let output = Command::new(root.join("sid/usr/lib64/ld-linux-x86-64.so.2"))
            .arg("--library-path")
            .arg(&libraries)
            .args(["--preload", &shims.join(":")])
            .arg(root.join("statistics"))
            .args(labels.keys())
            .env("VK_DRIVER_FILES", &manifest)
            .env("VK_ICD_FILENAMES", &manifest)
            .env("MESA_SHADER_CACHE_DISABLE", "true")
            .env(self.env[0], self.env[1])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let mut known = BTreeMap::new();
        for line in text.lines() {
            let mut fields = line.split('\t').filter_map(|field| field.split_once('='));
            let Some(("file", file)) = fields.next() else { continue };
            let values = fields.filter_map(|(name, value)| Some((name.to_string(), value.parse().ok()?)));
            known.insert(labels[file].to_string(), values.collect::<Statistics>());
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(known.len(), labels.len(), "{} compiled only these: {errors}", self.name);
        known
    }

    fn spills(&self, statistics: &Statistics) -> f64 {
        assert!(!statistics.contains_key("error"), "{}", self.name);
        self.spills.iter().map(|name| statistics.get(*name).copied().unwrap_or(0.0)).sum()
    }
}

/// Of each target, in their order.
fn compile_for_all(root: &Path) -> Vec<BTreeMap<String, Statistics>> {
    let folder = tempfile::tempdir().unwrap();
    let mut files = BTreeMap::new();
    for key in TARGETS.iter().flat_map(Target::chosen) {
        files.entry(label(&key)).or_insert_with_key(|label| {
            let path = folder.path().join(format!("{}.spv", label.replace(' ', "_")));
            std::fs::write(&path, spirv(&key)).unwrap();
            path.to_str().unwrap().to_string()
        });
    }
    std::thread::scope(|scope| {
        let compile = |target: &'static Target| scope.spawn(|| target.compile(root, &files));
        let running: Vec<_> = TARGETS.iter().map(compile).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn no_kernel_that_a_card_of_amd_nvidia_intel_or_apple_may_choose_spills_registers() {
    let Some(root) = compilers() else {
        eprintln!("NOT CHECKED: the compilers are not here; scripts/isa/fetch.sh gets them");
        return;
    };
    let mut spilling = Vec::new();
    for (target, known) in TARGETS.iter().zip(compile_for_all(&root)) {
        let spills = known.iter().filter(|(_, statistics)| target.spills(statistics) > 0.0);
        spilling.extend(spills.map(|(label, statistics)| format!("{}: {label} {statistics:?}", target.name)));
        // What the kernels of attention are built for.
        let floor = match target.name {
            "navi31" | "gfx1201" => 8.0,
            "AD102" => 16.0,
            _ => 0.0,
        };
        for (label, statistics) in known.iter().filter(|(label, _)| label.starts_with("attention")) {
            let busy = statistics[target.occupancy];
            assert!(busy >= floor, "{}: {label} has {busy} subgroups, not {floor}", target.name);
        }
    }
    assert!(spilling.is_empty(), "{} spill:\n{}", spilling.len(), spilling.join("\n"));
}

/// Products and sums of an invocation in one round of `matmul`'s loop over K.
fn products(label: &str) -> Option<f64> {
    let constant =
        |name: &str| label.split(&format!(" {name}=")).nth(1)?.split(' ').next()?.parse::<f64>().ok();
    let plain = label.starts_with("matmul m")
        && constant("EPILOGUE") == Some(0.0)
        && constant("ACCUMULATE") == Some(0.0);
    plain.then_some(16.0 * 4.0 * constant("ROWS")? * constant("FOURS")?)
}

/// `make isa`: writes the table of docs/kernels.md.
#[test]
#[ignore = "writes a page"]
fn the_table_of_the_page_about_kernels_is_written() {
    let root = compilers().expect("scripts/isa/fetch.sh gets the compilers");
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kernels.md");
    let text = std::fs::read_to_string(&page).unwrap();
    let all = compile_for_all(&root);
    // The header and the ways of finishing, of which the worst is shown, are left out.
    let row = |label: &str| {
        let hidden =
            ["EPILOGUE", "ACCUMULATE", "STARTS", "CACHED", "ACROSS", "LANES", "WRITTEN_OUT", "COLUMNS"];
        let name = label.split(' ').next().unwrap();
        // Which operand is a gradient changes a factor, where it is none of attention's three.
        let of_matmul = name.starts_with("matmul");
        let hidden = hidden.into_iter().chain(of_matmul.then_some("GRADIENT")).collect::<Vec<_>>();
        let shown =
            label.split(' ').filter(|word| word.contains('=') && !hidden.iter().any(|h| word.starts_with(h)));
        let shown: Vec<&str> = shown.collect();
        let tile = label
            .split("ACROSS=")
            .nth(1)
            .map_or("", |rest| if rest.starts_with("4 ") { " 128x16" } else { "" });
        let f16 = if label.contains(" f16,") { " f16" } else { "" };
        format!("`{name}`{f16} {}{tile}", shown.join(" ")).trim().to_string()
    };
    let mut rows: BTreeMap<String, [[f64; 3]; TARGETS.len()]> = BTreeMap::new();
    let mut costs: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (i, (target, known)) in TARGETS.iter().zip(&all).enumerate() {
        for (label, statistics) in known {
            let cell = &mut rows.entry(row(label)).or_insert([[0.0, 0.0, f64::MAX]; TARGETS.len()])[i];
            let of = |name: &str| statistics.get(name).copied().unwrap_or(0.0);
            cell[0] = cell[0].max(of(target.registers));
            cell[1] += target.spills(statistics);
            cell[2] = cell[2].min(of(target.occupancy));
            if let Some(products) = products(label) {
                let cost = format!("{} {:.1}", target.name, of(target.cycles) / products);
                costs.entry(row(label)).or_default().push(cost);
            }
        }
    }
    let mut table = String::from("| kernel |");
    TARGETS.iter().for_each(|target| write!(table, " {} |", target.name).unwrap());
    table += "\n|---|";
    TARGETS.iter().for_each(|_| table += "---|");
    for (label, cells) in &rows {
        write!(table, "\n| {label} |").unwrap();
        for [registers, spills, occupancy] in cells {
            match *occupancy {
                f64::MAX => table += " |",
                _ if *spills > 0.0 => {
                    write!(table, " {registers}, {occupancy}, **{spills} spilled** |").unwrap()
                }
                _ => write!(table, " {registers}, {occupancy} |").unwrap(),
            }
        }
    }
    table +=
        "\n\nCycles of one subgroup for each product of an invocation, with multiples of 4 and any shape:\n";
    for (label, costs) in &costs {
        write!(table, "\n- {label}: {}", costs.join(", ")).unwrap();
    }
    let (begin, end) = ("<!-- begin: make isa -->\n", "\n<!-- end: make isa -->");
    let (before, rest) = text.split_once(begin).unwrap();
    let (_, after) = rest.split_once(end).unwrap();
    std::fs::write(&page, format!("{before}{begin}{table}{end}{after}")).unwrap();
}
