//! Matmul: which kernel, which header, which grid. B may be packed as bf16; what is summed, and in which order, is the
//! same, so that a packed B gives bit for bit what its elements in f32 give.

use super::{Lowered, Lowering, Operand};
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
            constants.extend(fixed);
            let groups = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1];
            ("matmul", aligned.then(|| MULTIPLES_OF_4.as_str()), groups)
        }
    };
    let operands = vec![l.input(0), l.input(1), bias, extra, l.output(0), second];
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
