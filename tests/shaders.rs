//! Every shader text and every variant of it, checked by naga. No GPU.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use naga::valid::{Capabilities as Allowed, ValidationFlags, Validator};
use polystage::gpu::{Capabilities, KERNELS, KernelKey, Specialisation, source};
use polystage::model::Weights;
use polystage::ops::lower;
use polystage::ops::parameters::adamw;
use polystage::ops::verify::{cases, single_node};

/// What WebGPU promises of every adapter.
const STORAGE_BUFFERS: usize = 8;
const WORKGROUP_BYTES: u32 = 16 << 10;
const INVOCATIONS: u32 = 256;

fn files(folder: &str) -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.is_file())
        .map(|path| {
            assert_eq!(path.extension().unwrap(), "wgsl", "{}", path.display());
            let name = path.file_stem().unwrap().to_str().unwrap().to_string();
            (name, std::fs::read_to_string(path).unwrap())
        })
        .collect()
}

/// Parses and validates; panics with naga's own picture of the mistake.
fn valid(what: &str, text: &str) -> (naga::Module, naga::valid::ModuleInfo) {
    let module = naga::front::wgsl::parse_str(text)
        .unwrap_or_else(|error| panic!("{what}: {}", error.emit_to_string(text)));
    let mut validator = Validator::new(
        ValidationFlags::all(),
        Allowed::SUBGROUP
            | Allowed::SHADER_FLOAT16
            | Allowed::SHADER_FLOAT16_IN_FLOAT32
            | Allowed::COOPERATIVE_MATRIX,
    );
    let info = validator.validate(&module);
    let info = info.unwrap_or_else(|error| panic!("{what}: {}", error.emit_to_string(text)));
    (module, info)
}

/// A card, and what tells cards apart.
pub fn card(sums: u32, fill: u32) -> Capabilities {
    let (max_binding, max_buffer, max_groups) = (1 << 30, 1 << 30, 65535);
    Capabilities {
        software: false,
        subgroup: Some(32),
        has_f16: false,
        f16: false,
        cooperative: 0,
        sums,
        fill,
        written_out: true,
        tiles: Default::default(),
        dispatch: u64::MAX,
        max_binding,
        max_buffer,
        max_groups,
    }
}

/// The kernels that the ops choose with these capabilities, and those of what is no op.
pub fn kernels(capabilities: &Capabilities) -> HashSet<KernelKey> {
    let mut keys = HashSet::new();
    for case in cases() {
        let graph = single_node(&case).unwrap().0.graph;
        let lowered = lower(&graph, &graph.nodes[0], capabilities, case.accumulate, &graph.gradients());
        keys.extend(lowered.launches.into_iter().map(|launch| launch.key));
    }
    let plain =
        |name, constants| KernelKey { name, specialisation: Specialisation { header: None, constants } };
    keys.insert(plain("square_sum", vec![("LANES", if capabilities.software { 8 } else { 64 })]));
    keys.extend([Weights::F32, Weights::BF16, Weights::BF16Only].map(adamw));
    keys.extend(["accumulate", "ceiling", "pack", "unpack"].map(|name| plain(name, vec![])));
    keys
}

/// Every kernel, on adapters of every kind.
fn variants() -> HashSet<KernelKey> {
    let mut kinds = vec![card(16, 256), Capabilities { subgroup: None, ..card(16, 256) }];
    kinds.extend([16, 32, 64].map(|sums| card(sums, 1)));
    kinds.extend([16, 32, 64].map(|sums| card(sums, 3)));
    let software = [None, Some(4), Some(8), Some(32)];
    kinds.extend(software.map(|subgroup| Capabilities { software: true, subgroup, ..card(16, 1) }));
    let in_f16 = |kind: &Capabilities| Capabilities { f16: true, ..*kind };
    kinds.extend(kinds.iter().map(in_f16).collect::<Vec<_>>());
    let cooperative = [8, 16].map(|cooperative| Capabilities { f16: true, cooperative, ..card(64, 3) });
    kinds.extend(cooperative);
    kinds.iter().flat_map(kernels).collect()
}

#[test]
fn every_file_in_shaders_is_a_registered_kernel_and_every_kernel_a_file() {
    let files = files("shaders");
    let on_disk: BTreeSet<&str> = files.keys().map(String::as_str).collect();
    let registered: BTreeSet<&str> = KERNELS.iter().map(|(name, _)| *name).collect();
    assert_eq!(on_disk, registered);
    assert_eq!(registered.len(), KERNELS.len(), "a kernel is registered twice");
    for (name, text) in &files {
        assert_eq!(*text, source(name, None), "{name}");
    }
}

#[test]
fn every_shader_is_valid_wgsl_by_itself_and_starts_with_its_name() {
    for (name, text) in files("shaders") {
        let (module, _) = valid(&name, &text);
        let entries: Vec<&str> = module.entry_points.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(entries, ["main"], "{name}");
        let first = text.lines().next().unwrap();
        let named = [":", ","].iter().any(|end| first.starts_with(&format!("// {name}{end}")));
        assert!(named, "{name} starts with {first:?}");
        assert!(text.contains("Grid: "), "{name} does not say its grid");
    }
}

/// A header calls functions of the body that it stands above, so only with one is it a program.
#[test]
fn every_header_starts_with_its_name_and_is_part_of_a_valid_variant() {
    let variants = variants();
    for (name, text) in files("shaders/headers") {
        assert!(text.starts_with("// Header \""), "{name}");
        let user = variants.iter().find(|key| key.specialisation.header == Some(text.as_str()));
        let user = user.unwrap_or_else(|| panic!("no op chooses {name}"));
        valid(&name, &source(user.name, Some(&text)));
    }
}

#[test]
fn every_variant_that_an_op_can_choose_is_valid_and_within_what_webgpu_promises() {
    let mut used = BTreeSet::new();
    for key in variants() {
        used.insert(key.name);
        let what = format!("{} {:?}", key.name, key.specialisation.constants);
        let (module, info) = valid(&what, &source(key.name, key.specialisation.header));
        // An unknown name, a missing value or a workgroup of no size is an error here.
        let constants =
            key.specialisation.constants.iter().map(|&(name, value)| (name.to_string(), value as f64));
        let entry = Some((naga::ShaderStage::Compute, "main"));
        let constants = constants.collect();
        let resolved = naga::back::pipeline_constants::process_overrides(&module, &info, entry, &constants);
        let (module, _) = resolved.unwrap_or_else(|error| panic!("{what}: {error}"));
        let in_space = |wanted: fn(naga::AddressSpace) -> bool| {
            module
                .global_variables
                .iter()
                .map(|(_, v)| v)
                .filter(move |v| wanted(v.space))
                .collect::<Vec<_>>()
        };
        let storage = in_space(|space| matches!(space, naga::AddressSpace::Storage { .. }));
        assert!(storage.len() <= STORAGE_BUFFERS, "{what}: {} storage buffers", storage.len());
        let workgroup = in_space(|space| space == naga::AddressSpace::WorkGroup);
        let bytes: u32 = workgroup.iter().map(|v| module.types[v.ty].inner.size(module.to_ctx())).sum();
        // Its cards have more.
        let most = if key.name == "matmul_cooperative" { 28 << 10 } else { WORKGROUP_BYTES };
        assert!(bytes <= most, "{what}: {bytes} bytes of workgroup memory");
        let invocations: u32 = module.entry_points[0].workgroup_size.iter().product();
        assert!((1..=INVOCATIONS).contains(&invocations), "{what}: {invocations} invocations");
    }
    let registered: BTreeSet<&str> = KERNELS.iter().map(|(name, _)| *name).collect();
    assert_eq!(used, registered, "every kernel is chosen by some op");
}

#[test]
fn variants_differ_only_in_header_and_constants() {
    let rule = "// ---- body ----";
    for key in variants() {
        let text = source(key.name, key.specialisation.header);
        let own = source(key.name, None);
        let body = |text: &str| text.split_once(rule).map(|(_, body)| body.to_string());
        assert_eq!(body(&text), body(&own), "{}", key.name);
        assert!(text.matches(rule).count() <= 1, "{}", key.name);
    }
}

/// The text of a function in a shader.
fn function<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let start = text.find(&format!("\nfn {name}("))? + 1;
    text[start..].find("\n}").map(|end| &text[start..start + end])
}

/// A file is a whole program, so what several need stands in each of them; a mend must not miss one.
#[test]
fn functions_that_several_kernels_repeat_are_the_same_in_each() {
    let repeated: [(&str, &[&str]); 2] = [
        ("matmul", &["gate", "gelu_derivative", "within", "block", "part"]),
        (
            "attention",
            &[
                "packed",
                "plain",
                "packed_rows",
                "plain_rows",
                "rows_qkv",
                "rows_d_o",
                "row_count",
                "query",
                "output",
                "kept",
                "sharing",
                "last_key",
                "place",
                "dot4",
                "dots",
                "combine",
                "largest",
            ],
        ),
    ];
    let files = files("shaders");
    for (family, names) in repeated {
        for name in names {
            let of = files.iter().filter(|(file, _)| file.starts_with(family));
            let found: Vec<_> = of.filter_map(|(file, text)| Some((file, function(text, name)?))).collect();
            assert!(found.len() > 1, "{name} of {family} is not repeated");
            for (file, text) in &found {
                assert_eq!(*text, found[0].1, "{name} in {file} and {}", found[0].0);
            }
        }
    }
}

/// Whether a block of statements stores one component of a vector that all of a workgroup, or of a launch, sees.
fn stores_a_component(block: &naga::Block, module: &naga::Module, of: &naga::valid::FunctionInfo) -> bool {
    use naga::{AddressSpace, Statement, TypeInner};
    block.iter().any(|statement| match statement {
        Statement::Store { pointer, .. } => matches!(
            of[*pointer].ty.inner_with(&module.types),
            TypeInner::ValuePointer {
                size: None,
                space: AddressSpace::WorkGroup | AddressSpace::Storage { .. },
                ..
            }
        ),
        Statement::Block(block) => stores_a_component(block, module, of),
        Statement::If { accept, reject, .. } => {
            stores_a_component(accept, module, of) || stores_a_component(reject, module, of)
        }
        Statement::Loop { body, continuing, .. } => {
            stores_a_component(body, module, of) || stores_a_component(continuing, module, of)
        }
        Statement::Switch { cases, .. } => {
            cases.iter().any(|case| stores_a_component(&case.body, module, of))
        }
        _ => false,
    })
}

/// Two invocations that store two components of one vector may lose one: WGSL lets a store of a component be one of the whole
/// vector, and on Metal and D3D it is.
#[test]
fn no_kernel_stores_single_components_of_vectors_that_others_see() {
    let text = "var<workgroup> t: array<vec4<f32>, 4>; fn f(i: u32) { loop { if i > 2u { t[i][i] = 1.0; } break; } }";
    let (module, info) = valid("a component", text);
    let (handle, function) = module.functions.iter().next().unwrap();
    assert!(stores_a_component(&function.body, &module, &info[handle]), "is not found where there is one");
    for key in variants() {
        let (module, info) = valid(key.name, &source(key.name, key.specialisation.header));
        let main = (&module.entry_points[0].function.body, info.get_entry_point(0));
        let others = module.functions.iter().map(|(handle, function)| (&function.body, &info[handle]));
        for (body, of) in others.chain([main]) {
            assert!(
                !stores_a_component(body, &module, of),
                "{} {:?}",
                key.name,
                key.specialisation.constants
            );
        }
    }
}
