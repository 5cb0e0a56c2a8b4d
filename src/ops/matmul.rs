//! Matmul: which kernel, which header, which grid. B may be packed as bf16; what is summed, and in which order, is the
//! same, so that a packed B gives bit for bit what its elements in f32 give.

use std::sync::LazyLock;

use super::{Launch, Lowered, Lowering, Operand};
use crate::graph::{Epilogue, Layout, Op};

/// What stands above the body of a matmul: how it loads four neighbours.
struct Headers {
    /// For every kernel in f32.
    full: String,
    /// For those whose operands are rounded to f16 as they are loaded.
    rounded: String,
    /// For `matmul_cooperative` with matrices of 16x16 and of 8x8.
    cooperative: [String; 2],
}

/// "Any shape", "multiples of 4", and the two for a packed B.
static HEADERS: LazyLock<[Headers; 4]> = LazyLock::new(|| {
    let packed = include_str!("../../shaders/headers/matmul_packed.wgsl").into();
    let packed_multiples = include_str!("../../shaders/headers/matmul_packed_vec4.wgsl").into();
    // What is special about its matrices stands at the end of its header.
    let own = header_of("matmul_cooperative");
    let of_16 = &own[own.find("// ---- matrices of 16x16").unwrap_or(own.len())..];
    [header_of("matmul"), header_of("matmul_subgroup"), packed, packed_multiples]
        .map(|full| Headers::of(full, of_16))
});

const ROUNDED: &str = include_str!("../../shaders/parts/f16.wgsl");
const OF_8: &str = include_str!("../../shaders/parts/cooperative_8.wgsl");
const DIRECTIVES: &str = "enable f16;\nenable wgpu_cooperative_matrix;\n";

impl Headers {
    fn of(full: String, of_16: &str) -> Headers {
        let scaled = full
            .replace("more: u32 }", "more: u32, scale: f32, back: f32 }")
            .replace("// Header \"", "// Header \"f16, ");
        let rounded =
            scaled.replace("fn load_a(", "fn whole_a(").replace("fn load_b(", "fn whole_b(") + ROUNDED;
        let cooperative = [of_16, OF_8].map(|part| format!("{DIRECTIVES}{scaled}\n{part}"));
        Headers { full, rounded, cooperative }
    }
}

fn header_of(kernel: &str) -> String {
    let text = crate::gpu::source(kernel, None);
    text.split("// ---- body ----").next().unwrap_or_default().trim_end().to_string()
}

/// Rows or columns of C that are too few for square tiles.
const THIN: usize = 16;

/// Rows up to which reading B is most of the work. On a CPU the tiles do 8 rows in little more time.
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
    let headers = &HEADERS[usize::from(aligned) + 2 * usize::from(l.packed(1))];
    let operands = vec![l.input(0), l.input(1), bias, extra, l.output(0), second];
    let few = layout != 2 && m <= if l.capabilities.software { FEW_ON_CPU } else { FEW };
    let lanes = l.capabilities.subgroup.filter(|_| l.capabilities.software).map(|lanes| lanes.max(8));
    if few {
        // Reading B is all the work, in f32 too.
        let rows = ("ROWS", m.next_power_of_two() as u32);
        constants.extend(fixed);
        let (name, own, columns) = match (lanes, layout) {
            (Some(lanes), _) => ("matmul_rows_subgroup", vec![("LANES", lanes), rows], lanes as usize),
            (None, 1) => ("matmul_rows", vec![rows, ("QUADS", 1), ("SLICES", 64)], 1),
            (None, _) => ("matmul_rows", vec![rows, ("QUADS", 8), ("SLICES", 8)], 8),
        };
        constants.extend(own);
        let groups = l.spread(n.div_ceil(4 * columns));
        let words = parameters([m, n, k, (code + 8 * accumulate) as usize], false);
        let mut launch = l.launch(name, constants, operands, words, groups);
        launch.key.specialisation.header = Some(&headers.full);
        return Lowered::one(launch);
    }
    let f16 = l.capabilities.f16;
    if f16 {
        let gradient = (0..2).find(|&operand| l.is_gradient(operand)).map_or(0, |operand| operand as u32 + 1);
        constants.push(("GRADIENT", gradient));
    }
    let header = if f16 { &headers.rounded } else { &headers.full };
    // Workgroup memory pays on a GPU; on a CPU every barrier is a context switch and every load a gather.
    if let Some(lanes) = lanes {
        constants.push(("LANES", lanes));
        let wide = m > 8 && l.capabilities.subgroup.is_some_and(|size| size >= 8);
        let (name, [rows, columns]) =
            if wide { ("matmul_subgroup_wide", [16, 4]) } else { ("matmul_subgroup", [8, 8]) };
        let groups = [n.div_ceil(columns * lanes as usize) as u32, m.div_ceil(rows) as u32, 1];
        let words = parameters([m, n, k, (code + 8 * accumulate) as usize], f16);
        let mut launch = l.launch(name, constants, operands, words, groups);
        launch.key.specialisation.header = Some(header.as_str());
        launch.scaled = f16;
        return Lowered::one(launch);
    }
    let side = l.capabilities.cooperative as usize;
    let cooperative = f16 && side > 0 && !l.capabilities.software && m.min(n) > THIN;
    // Whether K is cut changes bits: the table says it, and not what was measured.
    let table = (!cooperative).then(|| Tile::choose(l, [m, n], k));
    let extents = table.map_or([8 * side; 2], Tile::extents);
    let count = slices(l, extents, [m, n], k);
    let (name, tile, header, step) = match table {
        None => ("matmul_cooperative", extents, &headers.cooperative[usize::from(side == 8)], 32),
        Some(table) => {
            let measured = Tile::measured(l, layout, [m, n]).filter(|_| count == 1);
            let tile = measured.unwrap_or(table);
            constants.extend(tile.constants());
            constants.push(("WRITTEN_OUT", u32::from(l.capabilities.written_out)));
            ("matmul", tile.extents(), header, 16)
        }
    };
    let mut whole = l.launch(name, constants, operands, Vec::new(), groups(tile, [m, n]));
    whole.key.specialisation.header = Some(header.as_str());
    whole.scaled = f16;
    match count {
        1 => in_bands(l, whole, [m, n, k], fixed),
        count => split(l, whole, [m, n, k], (count, step), fixed),
    }
}

/// The four numbers of every matmul, and behind them the loss scale where operands are rounded.
fn parameters(numbers: [usize; 4], scaled: bool) -> Vec<u32> {
    let scale = [1f32, 1.0].map(f32::to_bits);
    let scale = if scaled { &scale[..] } else { &[] };
    [&numbers.map(|x| x as u32)[..], scale].concat()
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
    /// 64x128 and 64x32, which the table never has.
    const OTHERS: [Tile; 2] = [Tile::new(32, 8, 1), Tile::new(8, 2, 1)];
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
            [_, ..=THIN] => Tile::TALL,
            [..=THIN, _] => Tile::FLAT,
            _ => {
                let fits = |tile: &&Tile| {
                    let [high, wide] = tile.extents();
                    let sums = 4 * tile.rows * tile.fours;
                    sums <= l.capabilities.sums as usize && 2 * extents[0] > high && 2 * extents[1] > wide
                };
                let busy = |tile: &&Tile| {
                    let tile = tile.extents();
                    count(tile, extents) * slices(l, tile, extents, k) >= l.capabilities.fill as usize
                };
                let smallest = Tile::SQUARE[2];
                *Tile::SQUARE.iter().filter(fits).find(busy).unwrap_or(&smallest)
            }
        }
    }

    /// The fastest on this card, if that was measured.
    fn measured(l: &Lowering, layout: u32, extents: [usize; 2]) -> Option<Tile> {
        let number = l.capabilities.tiles.0[layout as usize][size(extents)?];
        let mut all = Tile::SQUARE.into_iter().chain(Tile::OTHERS);
        let tile = all.nth(usize::from(number).checked_sub(1)?)?;
        (4 * tile.rows * tile.fours <= l.capabilities.sums as usize).then_some(tile)
    }

    /// Its rows and columns.
    fn extents(self) -> [usize; 2] {
        [256 / self.across * self.rows, 4 * self.across * self.fours]
    }

    fn constants(self) -> [(&'static str, u32); 3] {
        [("ACROSS", self.across as u32), ("ROWS", self.rows as u32), ("FOURS", self.fours as u32)]
    }
}

/// How many tiles there are to choose from.
pub(super) const TILES: u8 = 5;

/// The sides of square results from which on they are middling, and large.
const SIZES: [usize; 2] = [512, 1536];

/// The number of a result's size in [`crate::gpu::Tiles`]; none where it has too few rows or columns to be free.
fn size([m, n]: [usize; 2]) -> Option<usize> {
    let is = |side: &usize| m * n >= side * side;
    (m.min(n) > THIN).then(|| SIZES.iter().filter(|side| is(side)).count())
}

fn groups([high, wide]: [usize; 2], [m, n]: [usize; 2]) -> [u32; 3] {
    [n.div_ceil(wide) as u32, m.div_ceil(high) as u32, 1]
}

fn count(tile: [usize; 2], extents: [usize; 2]) -> usize {
    let [x, y, _] = groups(tile, extents);
    x as usize * y as usize
}

/// Into how many parts K is cut so that the card is busy, of at least 256 each: writing and reading a partial sum costs as
/// much as a few dozen of its terms.
fn slices(l: &Lowering, tile: [usize; 2], extents: [usize; 2], k: usize) -> usize {
    let wanted = (l.capabilities.fill as usize).div_ceil(count(tile, extents)).clamp(1, (k / 256).max(1));
    let fits = (l.capabilities.max_binding.min(PARTIAL) / (4 * extents[0] * extents[1]) as u64).max(1);
    wanted.min(fits as usize)
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
        let parameters = parameters([m, n, k, first as usize], whole.scaled);
        let flops = whole.flops * (rows as f64 / y as f64);
        Launch { parameters, groups: [x, rows, 1], flops, ..whole.clone() }
    };
    Lowered { launches: (0..y).step_by(band as usize).map(launch).collect(), scratch: Vec::new() }
}

/// Most bytes of partial sums.
const PARTIAL: u64 = 64 << 20;

/// Partial sums of slices of K, each of whole steps of the kernel, then their sum and what is to be done with it.
fn split(
    l: &Lowering,
    whole: Launch,
    [m, n, k]: [usize; 3],
    (slices, step): (usize, usize),
    fixed: [(&'static str, u32); 2],
) -> Lowered {
    let slice = k.div_ceil(slices).next_multiple_of(step);
    let slices = k.div_ceil(slice);
    let partial = Operand::Scratch(0);
    let operands = [&[partial, Operand::Unread][..], &whole.operands[2..]].concat();
    let groups = l.each(m * n.div_ceil(4));
    let mut reduce =
        l.launch("matmul_reduce", fixed.to_vec(), operands, parameters([m, n, slices, 0], false), groups);
    reduce.flops = (m * n * slices) as f64;
    reduce.key.specialisation.header = Some(&HEADERS[usize::from(n.is_multiple_of(4))].full);
    let [x, y, _] = whole.groups;
    let [a, b] = [whole.operands[0], whole.operands[1]];
    let mut sums = Launch {
        operands: vec![a, b, Operand::Unread, Operand::Unread, partial, Operand::Unwritten],
        parameters: parameters([m, n, k, slice], whole.scaled),
        groups: [x, y, slices as u32],
        ..whole
    };
    sums.key.specialisation.constants.push(("SPLIT", 1));
    Lowered { launches: vec![sums, reduce], scratch: vec![(4 * m * n * slices) as u64] }
}
