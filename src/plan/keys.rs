//! The keys of machine files: which there are, and which cannot be done without.

/// The keys of each table of a machine file, by the table's path.
pub const MACHINE_KEYS: &[(&str, &[&str])] = &[
    ("", ROOT),
    ("measured", MEASURED),
    ("link", WAY),
    ("links", LINKS),
    ("devices", DEVICE),
    ("devices.jitter", JITTER),
    ("devices.measured", MEASURED),
    ("devices.rates", RATES),
    ("devices.shapes", SHAPE),
    ("devices.shapes.measured", MEASURED),
    ("devices.shapes.layers", LAYER),
];

const ROOT: &[&str] = &[
    "name",
    "cores",
    "host_update_gb_s",
    "host_memory_gb_s",
    "slowdown",
    "measured",
    "link",
    "devices",
    "links",
];
const WAY: &[&str] = &["latency_us", "gb_s", "out_gb_s", "into_gb_s"];
const LINKS: &[&str] = &["from", "to", "latency_us", "gb_s", "out_gb_s", "into_gb_s"];
const DEVICE: &[&str] = &[
    "name",
    "driver",
    "adapter",
    "memory",
    "max_binding",
    "cores",
    "copy_engine",
    "jitter",
    "measured",
    "rates",
    "shapes",
];
const MEASURED: &[&str] = &["unix_seconds", "steps", "spread", "others", "trained"];
const JITTER: &[&str] = &["part", "seconds"];
const RATES: &[&str] = &[
    "peak_tflops",
    "peak_gb_s",
    "matmul_gflops",
    "memory_gb_s",
    "launch_us",
    "submit_us",
    "optimizer_gb_s",
    "norm_gb_s",
    "clear_gb_s",
    "barrier_us",
];
const SHAPE: &[&str] = &["shape", "submit_us", "measured", "layers"];
const LAYER: &[&str] = &["forward", "input", "weight", "backward"];

/// What cannot be done without, by the table's path; of several that mean the same, one.
pub(super) const NEEDED: &[(&str, &[&[&str]])] = &[
    ("measured", EVIDENCE),
    ("link", &[&["latency_us"], &["gb_s"]]),
    ("links", &[&["from"], &["to"], &["latency_us"], &["gb_s"]]),
    ("devices", &[&["name"], &["rates"]]),
    ("devices.jitter", &[&["part"], &["seconds"]]),
    ("devices.measured", EVIDENCE),
    ("devices.rates", &[&["matmul_gflops", "peak_tflops"], &["memory_gb_s", "peak_gb_s"]]),
    ("devices.shapes", &[&["shape"], &["layers"]]),
    ("devices.shapes.measured", EVIDENCE),
    ("devices.shapes.layers", &[&["forward"], &["input"], &["weight"]]),
];
const EVIDENCE: &[&[&str]] = &[&["unix_seconds"], &["steps"], &["spread"], &["trained"]];

/// What a list has for a table.
pub(super) fn of<T: Copy>(tables: &[(&str, T)], path: &str) -> Option<T> {
    tables.iter().find(|(name, _)| *name == path).map(|&(_, keys)| keys)
}
