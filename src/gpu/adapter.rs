//! What adapters the machine has.

use serde::Serialize;

use super::{Capabilities, Tiles};
use crate::error::Error;

/// One adapter, as listed by `polystage devices`.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterInfo {
    /// Position in the list: what `--devices` takes.
    pub index: usize,
    /// The driver's name for the card.
    pub name: String,
    /// Maker.
    pub vendor: String,
    /// PCI vendor id.
    pub vendor_id: u32,
    /// PCI device id.
    pub device_id: u32,
    /// Vulkan, Metal, Dx12, Gl or BrowserWebGpu.
    pub backend: String,
    /// discrete, integrated, virtual, software or other.
    pub kind: String,
    /// Driver name and version.
    pub driver: String,
    /// Whether it runs on the CPU.
    pub software: bool,
    /// 16-bit floats in shaders.
    pub f16: bool,
    /// Subgroup operations in shaders.
    pub subgroups: bool,
    /// Smallest and largest number of invocations in a subgroup.
    pub subgroup_size: [u32; 2],
    /// Cooperative matrix shapes, such as `16x16x16 F16->F32`.
    pub cooperative_matrices: Vec<String>,
    /// Largest buffer in bytes.
    pub max_buffer: u64,
    /// Largest storage binding in bytes.
    pub max_binding: u64,
    /// Storage buffers a kernel may bind.
    pub max_storage_buffers: u32,
    /// Invocations in a workgroup.
    pub max_workgroup: u32,
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Bytes that a plan may use by default: what of a card's own memory the driver says that others have left, or half of the
    /// free host memory for software and integrated adapters; with DirectX the budget of the system, and with Metal the working
    /// set that it recommends; none where the system does not say.
    pub memory: Option<u64>,
}

/// The adapters with their descriptions. The same GPU is listed once, real GPUs before software adapters, so that
/// indices do not move when a software adapter is installed.
pub async fn list(software_gl: bool) -> Vec<AdapterInfo> {
    found(software_gl).await.into_iter().map(|(_, info)| info).collect()
}

/// The error for an empty list, with the line that helps on this system.
pub fn none_found() -> Error {
    let help = if cfg!(target_os = "linux") {
        "install a driver for your GPU, or a software adapter: `sudo apt-get install mesa-vulkan-drivers`"
    } else if cfg!(target_os = "windows") {
        "install your GPU's current driver (it brings Vulkan and DirectX 12)"
    } else if cfg!(target_os = "macos") {
        "Metal needs macOS 10.13 or later and a GPU that supports it"
    } else {
        "enable WebGPU in this browser (Chromium on Linux: --enable-unsafe-webgpu)"
    };
    Error::NoAdapter { help: help.into() }
}

pub(super) fn instance(backends: wgpu::Backends) -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = backends;
    // No validation layers and no extra dispatches that check indirect ones: none are used.
    descriptor.flags = wgpu::InstanceFlags::empty();
    wgpu::Instance::new(descriptor)
}

/// Enumerates in a fresh instance. Vulkan and Metal; DirectX 12 where there is no Vulkan; OpenGL on request.
pub(super) async fn found(gl: bool) -> Vec<(wgpu::Adapter, AdapterInfo)> {
    #[cfg(target_arch = "wasm32")]
    let adapters: Vec<wgpu::Adapter> = {
        let _ = gl;
        let instance = instance(wgpu::Backends::BROWSER_WEBGPU);
        let mut adapters: Vec<wgpu::Adapter> = Vec::new();
        // A browser lists no adapters, but where a machine has two it may answer these two wishes with one each.
        for power_preference in [wgpu::PowerPreference::HighPerformance, wgpu::PowerPreference::LowPower] {
            let options = wgpu::RequestAdapterOptions { power_preference, ..Default::default() };
            let Ok(adapter) = instance.request_adapter(&options).await else { continue };
            if adapters.iter().all(|other| other.get_info() != adapter.get_info()) {
                adapters.push(adapter);
            }
        }
        adapters
    };
    #[cfg(not(target_arch = "wasm32"))]
    let adapters = {
        let native = wgpu::Backends::VULKAN | wgpu::Backends::METAL;
        let mut adapters = instance(native).enumerate_adapters(native).await;
        if adapters.is_empty() && cfg!(windows) {
            adapters = instance(wgpu::Backends::DX12).enumerate_adapters(wgpu::Backends::DX12).await;
        }
        if gl {
            adapters.extend(instance(wgpu::Backends::GL).enumerate_adapters(wgpu::Backends::GL).await);
        }
        adapters
    };
    let mut seen = Vec::new();
    let mut kept: Vec<wgpu::Adapter> = Vec::new();
    for adapter in adapters {
        let info = adapter.get_info();
        if !adapter.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS) {
            continue;
        }
        // Two drivers of one card share its PCI address; without one, two equal cards cannot be told from one
        // card listed twice by different drivers, so the driver's name decides.
        let key = if info.device_pci_bus_id.is_empty() {
            let twin = |k: &wgpu::Adapter| {
                let other = k.get_info();
                (other.vendor, other.device, other.driver) == (info.vendor, info.device, info.driver.clone())
            };
            format!("{}:{}:{}", info.vendor, info.device, kept.iter().filter(|k| twin(k)).count())
        } else {
            info.device_pci_bus_id.clone()
        };
        if !seen.contains(&key) {
            seen.push(key);
            kept.push(adapter);
        }
    }
    kept.sort_by_key(|a| a.get_info().device_type == wgpu::DeviceType::Cpu);
    kept.into_iter()
        .enumerate()
        .map(|(index, adapter)| {
            let info = describe(index, &adapter);
            (adapter, info)
        })
        .collect()
}

fn describe(index: usize, adapter: &wgpu::Adapter) -> AdapterInfo {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete",
        wgpu::DeviceType::IntegratedGpu => "integrated",
        wgpu::DeviceType::VirtualGpu => "virtual",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    };
    let or = |text: String, fallback: &str| if text.is_empty() { fallback.to_string() } else { text };
    AdapterInfo {
        index,
        name: or(info.name, "WebGPU adapter"),
        vendor: vendor_name(info.vendor, &info.driver),
        vendor_id: info.vendor,
        device_id: info.device,
        backend: format!("{:?}", info.backend),
        kind: kind.into(),
        driver: or(format!("{} {}", info.driver, info.driver_info).trim().to_string(), "unknown"),
        software: info.device_type == wgpu::DeviceType::Cpu,
        f16: features.contains(wgpu::Features::SHADER_F16),
        subgroups: features.contains(wgpu::Features::SUBGROUP),
        subgroup_size: [info.subgroup_min_size, info.subgroup_max_size],
        cooperative_matrices: adapter
            .cooperative_matrix_properties()
            .iter()
            .map(|p| format!("{}x{}x{} {:?}->{:?}", p.m_size, p.n_size, p.k_size, p.ab_type, p.cr_type))
            .collect(),
        max_buffer: limits.max_buffer_size,
        max_binding: limits.max_storage_buffer_binding_size,
        max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
        max_workgroup: limits.max_compute_invocations_per_workgroup,
        workgroup_memory: limits.max_compute_workgroup_storage_size,
        memory: memory(adapter, info.device_type),
    }
}

fn vendor_name(id: u32, driver: &str) -> String {
    match id {
        0x10de => "NVIDIA",
        0x1002 | 0x1022 => "AMD",
        0x8086 => "Intel",
        0x106b => "Apple",
        0x13b5 => "Arm",
        0x5143 => "Qualcomm",
        0x14e4 => "Broadcom",
        0x1414 => "Microsoft",
        0x10005 => "Mesa",
        0x1ae0 => "Google",
        0 if driver.is_empty() => "unknown",
        _ => return format!("0x{id:04x}"),
    }
    .into()
}

/// Running sums that an invocation of a maker's cards keeps in registers, as their compilers show (docs/kernels.md); of unknown
/// makers the fewest.
pub(super) fn sums(vendor_id: u32) -> u32 {
    match vendor_name(vendor_id, "").as_str() {
        "NVIDIA" | "AMD" | "Apple" => 64,
        "Intel" => 32,
        _ => 16,
    }
}

/// Rows and columns of the square matrices of f16 whose products a subgroup sums in f32: 16 or 8, and 0 where there are none, or less
/// workgroup memory than their kernel takes.
pub(super) fn cooperative(adapter: &wgpu::Adapter) -> u32 {
    use wgpu::CooperativeScalarType::{F16, F32};
    use wgpu::Features as F;

    let features = F::SHADER_F16 | F::SUBGROUP | F::EXPERIMENTAL_COOPERATIVE_MATRIX;
    if !adapter.features().contains(features)
        || adapter.limits().max_compute_workgroup_storage_size < COOPERATIVE_BYTES
    {
        return 0;
    }
    let shapes = adapter.cooperative_matrix_properties();
    let has = |side: &u32| {
        let fits = |p: &wgpu::CooperativeMatrixProperties| {
            [p.m_size, p.n_size, p.k_size] == [*side; 3] && (p.ab_type, p.cr_type) == (F16, F32)
        };
        shapes.iter().any(fits)
    };
    [16, 8].into_iter().find(has).unwrap_or(0)
}

/// Bytes of workgroup memory of `matmul_cooperative` with the larger matrices.
const COOPERATIVE_BYTES: u32 = 28 << 10;

/// Two for each core of the largest cards. No interface tells their number; smaller cards lose little by more workgroups.
pub(super) const FILL: u32 = 256;

/// A millisecond on the largest cards, a third of a second on the smallest.
pub(super) const DISPATCH: u64 = 32_000_000_000;

/// Bytes of the adapter's memory that this program may use.
#[cfg(all(not(target_arch = "wasm32"), not(target_vendor = "apple")))]
fn memory(adapter: &wgpu::Adapter, kind: wgpu::DeviceType) -> Option<u64> {
    use ash::{ext, vk};

    #[cfg(windows)]
    if let Some(bytes) = budget(adapter).filter(|_| kind != wgpu::DeviceType::Cpu) {
        return Some(bytes);
    }
    if kind != wgpu::DeviceType::DiscreteGpu {
        return free_host_memory().map(|bytes| bytes / 2);
    }
    // SAFETY: the handles are only asked for properties while the adapter lives.
    unsafe {
        let hal = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        let (instance, card) = (hal.shared_instance().raw_instance(), hal.raw_physical_device());
        let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
        let mut properties = vk::PhysicalDeviceMemoryProperties2::default();
        let tells = hal.physical_device_capabilities().supports_extension(ext::memory_budget::NAME);
        let memory = match tells {
            true => {
                properties = properties.push_next(&mut budget);
                instance.get_physical_device_memory_properties2(card, &mut properties);
                properties.memory_properties
            }
            false => instance.get_physical_device_memory_properties(card),
        };
        let heaps = memory.memory_heaps_as_slice().iter().enumerate();
        let own = heaps.filter(|(_, heap)| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL));
        // The largest such heap is the card's memory. Of it others have taken some: a desktop, a browser.
        let (number, heap) = own.max_by_key(|(_, heap)| heap.size)?;
        let left = if tells { budget.heap_budget[number] } else { 0 };
        Some(without_drivers(if left > 0 { left.min(heap.size) } else { heap.size }))
    }
}

/// What is left of a card's free memory once its driver has what it keeps for a program, kernels and queues, which no interface
/// tells: taken to be half a gigabyte, of small cards no more than an eighth.
#[cfg(all(not(target_arch = "wasm32"), not(target_vendor = "apple")))]
fn without_drivers(bytes: u64) -> u64 {
    bytes - (512 << 20).min(bytes / 8)
}

/// What DirectX 12 says that the system leaves this program of the memory that is the card's own, or as near to it as any.
#[cfg(windows)]
fn budget(adapter: &wgpu::Adapter) -> Option<u64> {
    use windows::Win32::Graphics::Dxgi::{DXGI_MEMORY_SEGMENT_GROUP_LOCAL, DXGI_QUERY_VIDEO_MEMORY_INFO};

    let mut said = DXGI_QUERY_VIDEO_MEMORY_INFO::default();
    // SAFETY: the handle is only asked for a property while the adapter lives.
    unsafe {
        let hal = adapter.as_hal::<wgpu::hal::api::Dx12>()?;
        hal.raw_adapter().QueryVideoMemoryInfo(0, DXGI_MEMORY_SEGMENT_GROUP_LOCAL, &mut said).ok()?;
    }
    Some(said.Budget).filter(|&bytes| bytes > 0).map(without_drivers)
}

/// As much as Metal says that it keeps fast.
#[cfg(target_vendor = "apple")]
fn memory(adapter: &wgpu::Adapter, _: wgpu::DeviceType) -> Option<u64> {
    use objc2_metal::MTLDevice;

    // SAFETY: the handle is only asked for a property while the adapter lives.
    let hal = unsafe { adapter.as_hal::<wgpu::hal::api::Metal>() }?;
    Some(hal.raw_device().recommendedMaxWorkingSetSize()).filter(|&bytes| bytes > 0)
}

#[cfg(target_arch = "wasm32")]
fn memory(_: &wgpu::Adapter, _: wgpu::DeviceType) -> Option<u64> {
    None
}

/// MemAvailable of Linux; other systems do not say without a further library.
#[cfg(all(not(target_arch = "wasm32"), not(target_vendor = "apple")))]
fn free_host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// A GPU without subgroups that is not there, which binds so many bytes at once; nothing limits it unless that is known.
pub(crate) fn imagined(index: usize, name: &str, max_binding: Option<u64>) -> (AdapterInfo, Capabilities) {
    let max_binding = max_binding.unwrap_or(u64::MAX);
    let capabilities = Capabilities {
        software: false,
        subgroup: None,
        has_f16: false,
        f16: false,
        cooperative: 0,
        sums: sums(0),
        fill: FILL,
        written_out: true,
        tiles: Tiles::default(),
        dispatch: DISPATCH,
        max_binding,
        max_buffer: u64::MAX,
        max_groups: 65535,
    };
    let info = AdapterInfo {
        index,
        name: name.into(),
        vendor: String::new(),
        vendor_id: 0,
        device_id: 0,
        backend: String::new(),
        kind: "imagined".into(),
        driver: String::new(),
        software: false,
        f16: false,
        subgroups: false,
        subgroup_size: [0, 0],
        cooperative_matrices: Vec::new(),
        max_buffer: u64::MAX,
        max_binding,
        max_storage_buffers: 8,
        max_workgroup: 256,
        workgroup_memory: 16 << 10,
        memory: None,
    };
    (info, capabilities)
}
