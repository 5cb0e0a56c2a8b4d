//! What the host's memory gives to copies.

use std::time::Instant;

/// Bytes that each core copies at once: more than caches hold of all of them.
const PIECE: usize = 16 << 20;
/// Cores that are enough to keep any memory busy.
const ENOUGH: usize = 8;
/// Measurements; the first also finds its memory, and of the others the middle one counts.
const TIMES: usize = 4;

/// 10⁹ bytes a second that the cores read and write together while each copies.
pub(super) fn memory_gb_s(cores: usize) -> f64 {
    let mut pieces: Vec<(Vec<u8>, Vec<u8>)> =
        (0..cores.clamp(1, ENOUGH)).map(|core| (vec![core as u8 | 1; PIECE], vec![0; PIECE])).collect();
    let bytes = (2 * PIECE * pieces.len()) as f64;
    let mut all = || {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for (from, to) in &mut pieces {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
        bytes / super::GIGA / started.elapsed().as_secs_f64().max(1e-9)
    };
    let mut speeds = [0.0; TIMES].map(|_: f64| all());
    speeds[1..].sort_by(f64::total_cmp);
    speeds[1 + (TIMES - 1) / 2]
}
