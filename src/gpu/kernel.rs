//! Kernels: the shader files, their variants, and pipelines made of them. The only place that builds shader text.
//!
//! A file in `shaders/` is complete, valid WGSL. Above the line `// ---- body ----` stands its default header; a
//! variant may replace that header and set `override` constants, never touch the body.

use super::Device;
use crate::error::Result;

const RULE: &str = "// ---- body ----";

macro_rules! kernels {
    ($($name:literal),* $(,)?) => {
        /// Every kernel: its name and the text of its file.
        pub const KERNELS: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../shaders/", $name, ".wgsl")))),*];
    };
}

kernels![
    "accumulate",
    "adamw",
    "attention",
    "attention_backward",
    "attention_backward_key_subgroup",
    "attention_backward_query_subgroup",
    "attention_delta",
    "attention_subgroup",
    "cache_write",
    "ceiling",
    "column_sum",
    "cross_entropy",
    "elementwise",
    "embedding",
    "embedding_backward",
    "layernorm",
    "layernorm_backward",
    "layernorm_weight_backward",
    "matmul",
    "matmul_cooperative",
    "matmul_reduce",
    "matmul_rows",
    "matmul_rows_subgroup",
    "matmul_subgroup",
    "matmul_subgroup_wide",
    "pack",
    "rmsnorm",
    "rmsnorm_backward",
    "rmsnorm_weight_backward",
    "rope",
    "rope_backward",
    "square_sum",
    "swiglu",
    "swiglu_backward",
    "unpack",
];

/// What makes one pipeline of a kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Specialisation {
    /// A header that takes the place of the file's own.
    pub header: Option<&'static str>,
    /// Values of `override` constants; booleans are 0 and 1.
    pub constants: Vec<(&'static str, u32)>,
}

/// A kernel with its specialisation: the key of the pipeline cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KernelKey {
    /// File name in `shaders/` without its ending.
    pub name: &'static str,
    /// Header and constants.
    pub specialisation: Specialisation,
}

/// The text of a variant.
///
/// # Panics
/// When no kernel has that name or a header is given for a file without a rule line: mistakes in this crate.
pub fn source(name: &str, header: Option<&str>) -> String {
    let (_, text) = KERNELS.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no kernel {name}"));
    match header {
        None => text.to_string(),
        Some(header) => {
            let (_, body) = text.split_once(RULE).unwrap_or_else(|| panic!("{name} has no body rule"));
            format!("{header}\n{RULE}{body}")
        }
    }
}

/// A compiled pipeline with the layout of its one bind group.
#[derive(Debug)]
pub struct Kernel {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
}

/// Binding numbers with their kinds, as declared in the text: an explicit layout keeps bindings that a variant does
/// not use, where an automatic one would drop them.
fn bindings(text: &str) -> Vec<wgpu::BindGroupLayoutEntry> {
    let declarations = text.split("@binding(").skip(1);
    declarations
        .filter_map(|rest| {
            let binding = rest.split(')').next()?.trim().parse().ok()?;
            let space = rest.split("var<").nth(1)?.split('>').next()?;
            let ty = match space.replace(' ', "").as_str() {
                "uniform" => wgpu::BufferBindingType::Uniform,
                "storage,read_write" => wgpu::BufferBindingType::Storage { read_only: false },
                _ => wgpu::BufferBindingType::Storage { read_only: true },
            };
            Some(wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
                count: None,
            })
        })
        .collect()
}

impl Kernel {
    pub(super) fn compile(device: &Device, key: &KernelKey) -> Result<Kernel> {
        let text = source(key.name, key.specialisation.header);
        #[cfg(target_arch = "wasm32")]
        let text = match text.contains("@builtin(subgroup") {
            // Browsers that know nothing of them refuse a shader that asks.
            true => super::browser::SUBGROUPS.to_string() + &text,
            false => text,
        };
        let raw = device.raw();
        let label = Some(key.name);
        let descriptor =
            wgpu::ShaderModuleDescriptor { label, source: wgpu::ShaderSource::Wgsl(text.as_str().into()) };
        let module = if device.trusted() {
            // SAFETY: the kernels are this crate's own; with the checks on, the tests run every one of them on
            // odd shapes, so no index leaves its buffer and every loop ends.
            unsafe { raw.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        } else {
            raw.create_shader_module(descriptor)
        };
        let layout = raw
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &bindings(&text) });
        let pipeline_layout = raw.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let constants: Vec<(&str, f64)> =
            key.specialisation.constants.iter().map(|(name, value)| (*name, *value as f64)).collect();
        let pipeline = raw.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                // Kernels write workgroup memory before they read it.
                zero_initialize_workgroup_memory: false,
            },
            #[cfg(not(target_arch = "wasm32"))]
            cache: device.pipelines().get().map(super::pipelines::Pipelines::cache),
            #[cfg(target_arch = "wasm32")]
            cache: None,
        });
        device.check(&format!("compiling kernel {}", key.name))?;
        Ok(Kernel { pipeline, layout })
    }
}
