//! `polystage devices`.

use super::progress::Counter;
use super::{Features, adapters, print, say, show_bytes};
use crate::error::Result;
use crate::gpu::{AdapterInfo, Device};
use crate::ops::bench;

/// Lists the adapters of this machine, each GPU once.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  polystage devices --bench")]
pub(super) struct Arguments {
    /// Measure each adapter: matmul, memory, upload, read-back.
    #[arg(long)]
    bench: bool,
    #[command(flatten)]
    features: Features,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<u8> {
    let adapters = adapters()?;
    let mut list = Vec::new();
    for adapter in &adapters {
        let speed = if arguments.bench {
            let device = pollster::block_on(Device::open(adapter.index, arguments.features.options()))?;
            let name = adapter.name.clone();
            let bar = Counter::new(bench::MEASUREMENTS, move |done, all| {
                format!("measuring {name}, {}/{all}", (done + 1).min(all))
            });
            Some(device.block_on(bench::measure(&device, || bar.one_more()))?)
        } else {
            None
        };
        if !arguments.json {
            say(describe(adapter))?;
            if let Some(s) = &speed {
                say(format!(
                    "   measured: f32 matmul {:.1} GFLOP/s, memory {:.2} GB/s, upload {:.2} GB/s, read-back {:.2} GB/s, read-back latency {:.3} ms",
                    s.matmul_gflops, s.memory_gb_s, s.upload_gb_s, s.readback_gb_s, s.readback_latency_ms
                ))?;
            }
        }
        let mut value = serde_json::to_value(adapter).unwrap_or_default();
        if let Some(speed) = speed {
            value["bench"] = serde_json::to_value(speed).unwrap_or_default();
        }
        list.push(value);
    }
    if arguments.json {
        print(serde_json::to_string_pretty(&list).unwrap_or_default())?;
    }
    Ok(0)
}

fn describe(a: &AdapterInfo) -> String {
    let yes = |b: bool| if b { "yes" } else { "no" };
    let subgroups = match (a.subgroups, a.subgroup_size) {
        (true, [low, high]) if low == high => format!("yes, of {low}"),
        (true, [low, high]) => format!("yes, of {low} to {high}"),
        _ => "no".into(),
    };
    let matrices =
        if a.cooperative_matrices.is_empty() { "no".into() } else { a.cooperative_matrices.join(", ") };
    let memory = a.memory.map_or("unknown".into(), |m| format!("{} usable", show_bytes(m)));
    format!(
        "{}: {}\n   {}, {}, {}; driver {}\n   memory {memory}; buffers up to {}, bindings up to {}, {} storage buffers a kernel\n   workgroups of {} with {} of memory; f16 {}; subgroups {subgroups}; cooperative matrices {matrices}",
        a.index,
        a.name,
        a.vendor,
        a.backend,
        a.kind,
        a.driver,
        show_bytes(a.max_buffer),
        show_bytes(a.max_binding),
        a.max_storage_buffers,
        a.max_workgroup,
        show_bytes(a.workgroup_memory as u64),
        yes(a.f16),
    )
}
