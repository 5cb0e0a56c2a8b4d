//! Which tile of a matmul is fastest on this card. They give the same bits, so that a clock may choose; whether K is cut, or
//! cooperative matrices are used, is never measured.

use super::bench::run;
use super::matmul::TILES;
use crate::error::Result;
use crate::gpu::{Capabilities, Device, Tiles, now};
use crate::graph::{Epilogue, Layout, Op};

/// Sides of results, one of each size, and terms of their sums: too few to be cut into slices.
pub const SIDES: [usize; 3] = [384, 1024, 2048];
const TERMS: usize = 480;

/// Seconds of a submission in which the time that it takes to hand it over is lost, and the most launches that make them.
const ENOUGH: f64 = 0.005;
const MOST: usize = 512;

/// Seconds of work after which a card has left the clock at which it rests.
const WARM: f64 = 0.1;

/// What a tile must gain on the table's to be chosen: less is noise.
const GAIN: f64 = 0.03;

/// Measures for about so many seconds; what there was no time for is left to the table. Nothing else should run on the device.
/// `sides`: usually [`SIDES`].
///
/// # Errors
/// Those of the device.
pub async fn tune(device: &Device, sides: [usize; 3], seconds: f64) -> Result<Tiles> {
    let end = now() + seconds;
    let mut best = Tiles::default();
    let native = Capabilities { f16: false, tiles: Tiles::default(), ..*device.capabilities() };
    let table = device.with(native);
    let mut cold = WARM;
    // What takes most of a step first.
    for (size, side) in sides.into_iter().enumerate().rev() {
        for (layout, wanted) in [Layout::NN, Layout::NT, Layout::TN].into_iter().zip(&mut best.0) {
            let op = Op::Matmul { layout, epilogue: Epilogue::None };
            let shapes = match layout {
                Layout::NN => [[side, TERMS], [TERMS, side]],
                Layout::NT => [[side, TERMS], [side, TERMS]],
                Layout::TN => [[TERMS, side], [TERMS, side]],
            };
            let shapes = shapes.map(|shape| shape.to_vec());
            let mut times = 1;
            while run(&table, &op, &shapes, times).await? < ENOUGH && times < MOST {
                times *= 8;
            }
            let warm = now() + std::mem::take(&mut cold);
            while now() < warm {
                run(&table, &op, &shapes, times).await?;
            }
            let mut shortest = run(&table, &op, &shapes, times).await? * (1.0 - GAIN);
            let mut found = 0;
            for number in 1..=TILES {
                if now() > end {
                    return Ok(best);
                }
                let capabilities = Capabilities { tiles: Tiles([[number; 3]; 3]), ..native };
                let time = run(&device.with(capabilities), &op, &shapes, times).await?;
                if time < shortest {
                    (shortest, found) = (time, number);
                }
            }
            // Once more, should the clock have risen meanwhile.
            if found > 0 && shortest < run(&table, &op, &shapes, times).await? * (1.0 - GAIN) {
                wanted[size] = found;
            }
        }
    }
    Ok(best)
}
