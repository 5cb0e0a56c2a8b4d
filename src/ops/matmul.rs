//! Matmul: which kernel, which header, which grid. B may be packed as bf16; what is summed, and in which order, is the
//! same, so that a packed B gives bit for bit what its elements in f32 give.

use super::{Launch, Lowered, Lowering, Operand};
use crate::graph::{Epilogue, Layout, Op};

/// Header of `matmul`: any shape. Header of `matmul_subgroup`: M, N and K multiples of 4. Each borrows the other's, and
/// the kernels for few rows borrow one of them.
static ANY_SHAPE: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| header_of("matmul"));
static MULTIPLES_OF_4: std::sync::LazyLock<String> =
    std::sync::LazyLock::new(|| header_of("matmul_subgroup"));

/// The same two headers for a packed B.
const PACKED_ANY_SHAPE: &str = include_str!("../../shaders/headers/matmul_packed.wgsl");
const PACKED_MULTIPLES_OF_4: &str = include_str!("../../shaders/headers/matmul_packed_vec4.wgsl");

fn header_of(kernel: &str) -> String {
    let text = crate::gpu::source(kernel, None);
    text.split("// ---- body ----").next().unwrap_or_default().trim_end().to_string()
}

/// Rows up to which reading B is most of the work. On a CPU `matmul_subgroup` does 8 rows in little more time.
const FEW: usize = 16;
const FEW_ON_CPU: usize = 4;

pub(super) fn matmul(l: &Lowering, layout: Layout, epilogue: Epilogue) -> Lowered {
    let (m, n, k) = Op::matmul_extents(layout, l.shape(0), l.shape(1));
    let (code, bias, extra, second) = match epilogue {
        Epilogue::None => (0, Operand::Unread, Operand::Unread, Operand::Unwritten),
        Epilogue::Bias => (1, l.input(2), Operand::Unread, Operand::Unwritten),
        Epilogue::BiasGelu => (2, l.input(2), Operand::Unread, l.output(1)),
        Epilogue::BiasResidual => (3, l.input(2), l.input(3), Operand::Unwritten),
        Epilogue::Residual => (5, Operand::Unread, l.input(2), Operand::Unwritten),
        Epilogue::GeluBackward => (4, Operand::Unread, l.input(2), Operand::Unwritten),
    };
    let layout = match layout {
        Layout::NN => 0,
        Layout::NT => 1,
        Layout::TN => 2,
    };
    let mut constants = vec![("LAYOUT", layout)];
    let accumulate = u32::from(l.accumulate);
    let fixed = [("EPILOGUE", code), ("ACCUMULATE", accumulate)];
    // Of A and B only the transposed A is loaded along M.
    let aligned = n.is_multiple_of(4) && k.is_multiple_of(4) && (layout != 2 || m.is_multiple_of(4));
    let few = layout != 2 && m <= if l.capabilities.software { FEW_ON_CPU } else { FEW };
    let rows = ("ROWS", m.next_power_of_two() as u32);
    let packed = l.packed(1).then_some(if aligned { PACKED_MULTIPLES_OF_4 } else { PACKED_ANY_SHAPE });
    let operands = vec![l.input(0), l.input(1), bias, extra, l.output(0), second];
    // Workgroup memory pays on a GPU; on a CPU every barrier is a context switch and every load a gather.
    let (name, header, groups) = match l.capabilities.subgroup {
        Some(lanes) if l.capabilities.software => {
            let lanes = lanes.max(8);
            constants.push(("LANES", lanes));
            let header = (!aligned).then(|| ANY_SHAPE.as_str());
            if few {
                constants.extend(fixed);
                constants.push(rows);
                ("matmul_rows_subgroup", header, l.spread(n.div_ceil(4 * lanes as usize)))
            } else {
                let groups = [n.div_ceil(8 * lanes as usize) as u32, m.div_ceil(8) as u32, 1];
                ("matmul_subgroup", header, groups)
            }
        }
        _ if few => {
            let [quads, slices] = if layout == 1 { [1, 64] } else { [8, 8] };
            constants.extend(fixed);
            constants.extend([rows, ("QUADS", quads), ("SLICES", slices)]);
            let groups = l.spread(n.div_ceil(4 * quads as usize));
            ("matmul_rows", aligned.then(|| MULTIPLES_OF_4.as_str()), groups)
        }
        _ => {
            let tile = Tile::choose(l, [m, n], k);
            constants.extend(tile.constants());
            constants.push(("WRITTEN_OUT", u32::from(l.capabilities.written_out)));
            let mut whole = l.launch("matmul", constants, operands, Vec::new(), tile.groups([m, n]));
            whole.key.specialisation.header = packed.or(aligned.then(|| MULTIPLES_OF_4.as_str()));
            return match tile.slices(l, [m, n], k) {
                1 => in_bands(l, whole, [m, n, k], fixed),
                slices => split(l, whole, [m, n, k], slices, fixed),
            };
        }
    };
    let mut launch = l.launch(
        name,
        constants,
        operands,
        vec![m as u32, n as u32, k as u32, code + 8 * accumulate],
        groups,
    );
    launch.key.specialisation.header = packed.or(header);
    Lowered::one(launch)
}

/// What a workgroup of `matmul` owns of C. Whichever it is, an element is summed in the same order.
#[derive(Clone, Copy)]
struct Tile {
    /// Invocations along N, of 256.
    across: usize,
    /// Rows of an invocation.
    rows: usize,
    /// Columns of an invocation in units of 4.
    fours: usize,
}

impl Tile {
    /// 128x128, 128x64, 64x64: the more sums an invocation has, the fewer loads are needed for each.
    const SQUARE: [Tile; 3] = [Tile::new(16, 8, 2), Tile::new(16, 8, 1), Tile::new(16, 4, 1)];
    /// 128x16 and 16x128, for matrices of low rank.
    const TALL: Tile = Tile::new(4, 2, 1);
    const FLAT: Tile = Tile::new(32, 2, 1);

    const fn new(across: usize, rows: usize, fours: usize) -> Tile {
        Tile { across, rows, fours }
    }

    /// The largest tile that the card's registers hold, of which C fills more than half, and that keeps all of the card busy,
    /// with K split if need be.
    fn choose(l: &Lowering, extents: [usize; 2], k: usize) -> Tile {
        match extents {
            [_, ..=16] => Tile::TALL,
            [..=16, _] => Tile::FLAT,
            _ => {
                let fits = |tile: &&Tile| {
                    let [high, wide] = tile.extents();
                    let sums = 4 * tile.rows * tile.fours;
                    sums <= l.capabilities.sums as usize && 2 * extents[0] > high && 2 * extents[1] > wide
                };
                let busy = |tile: &&Tile| {
                    tile.count(extents) * tile.slices(l, extents, k) >= l.capabilities.fill as usize
                };
                let smallest = Tile::SQUARE[2];
                *Tile::SQUARE.iter().filter(fits).find(busy).unwrap_or(&smallest)
            }
        }
    }

    /// Its rows and columns.
    fn extents(self) -> [usize; 2] {
        [256 / self.across * self.rows, 4 * self.across * self.fours]
    }

    fn groups(self, [m, n]: [usize; 2]) -> [u32; 3] {
        let [high, wide] = self.extents();
        [n.div_ceil(wide) as u32, m.div_ceil(high) as u32, 1]
    }

    fn count(self, extents: [usize; 2]) -> usize {
        let [x, y, _] = self.groups(extents);
        x as usize * y as usize
    }

    /// Into how many parts K is cut so that the card is busy, of at least 256 each: writing and reading a partial sum costs as
    /// much as a few dozen of its terms.
    fn slices(self, l: &Lowering, extents: [usize; 2], k: usize) -> usize {
        let wanted = (l.capabilities.fill as usize).div_ceil(self.count(extents)).clamp(1, (k / 256).max(1));
        let fits = (l.capabilities.max_binding.min(PARTIAL) / (4 * extents[0] * extents[1]) as u64).max(1);
        wanted.min(fits as usize)
    }

    fn constants(self) -> [(&'static str, u32); 3] {
        [("ACROSS", self.across as u32), ("ROWS", self.rows as u32), ("FOURS", self.fours as u32)]
    }
}

/// Launches of so many rows of tiles each that none takes a card long: a driver takes one of two seconds for a hung card, and the
/// slowest cards do some 10¹¹ operations a second.
fn in_bands(
    l: &Lowering,
    mut whole: Launch,
    [m, n, k]: [usize; 3],
    fixed: [(&'static str, u32); 2],
) -> Lowered {
    whole.key.specialisation.constants.extend(fixed);
    let [x, y, _] = whole.groups;
    let launches = (whole.flops / l.capabilities.dispatch as f64).ceil().clamp(1.0, y as f64) as u32;
    let band = y.div_ceil(launches);
    let launch = |first: u32| {
        let rows = band.min(y - first);
        let parameters = vec![m as u32, n as u32, k as u32, first];
        let flops = whole.flops * (rows as f64 / y as f64);
        Launch { parameters, groups: [x, rows, 1], flops, ..whole.clone() }
    };
    Lowered { launches: (0..y).step_by(band as usize).map(launch).collect(), scratch: Vec::new() }
}

/// Most bytes of partial sums.
const PARTIAL: u64 = 64 << 20;

/// Partial sums of slices of K, then their sum and what is to be done with it.
fn split(
    l: &Lowering,
    whole: Launch,
    [m, n, k]: [usize; 3],
    slices: usize,
    fixed: [(&'static str, u32); 2],
) -> Lowered {
    // Of whole steps of the kernel.
    let slice = k.div_ceil(slices).next_multiple_of(16);
    let slices = k.div_ceil(slice);
    let partial = Operand::Scratch(0);
    let operands = [&[partial, Operand::Unread][..], &whole.operands[2..]].concat();
    let parameters = [m, n, slices, 0].map(|x| x as u32).to_vec();
    let groups = l.each(m * n.div_ceil(4));
    let mut reduce = l.launch("matmul_reduce", fixed.to_vec(), operands, parameters, groups);
    reduce.flops = (m * n * slices) as f64;
    reduce.key.specialisation.header = n.is_multiple_of(4).then(|| MULTIPLES_OF_4.as_str());
    let [x, y, _] = whole.groups;
    let [a, b] = [whole.operands[0], whole.operands[1]];
    let mut sums = Launch {
        operands: vec![a, b, Operand::Unread, Operand::Unread, partial, Operand::Unwritten],
        parameters: [m, n, k, slice].map(|x| x as u32).to_vec(),
        groups: [x, y, slices as u32],
        ..whole
    };
    sums.key.specialisation.constants.push(("SPLIT", 1));
    Lowered { launches: vec![sums, reduce], scratch: vec![(4 * m * n * slices) as u64] }
}
