//! Weights from a model's or an adapter's folder to the devices that use them, a piece at a time: the whole model is never in host memory.

use super::Executor;
use super::executor::Held;
use super::rank::{Command, Rank, Replies, Reply};
use crate::error::Result;
use crate::folder::{Dtype, Tensors};
use crate::gpu::{Buffer, Device, Mapping, Range};
use crate::graph::DType;
use crate::model::tensor::Run;
use crate::model::{Parameter, init};
use crate::ops::parameters::Part;

/// Most elements of a mapped buffer.
const PIECE: usize = 1 << 20;
/// Mapped buffers of a device.
const RING: usize = 2;
/// Elements that are converted at a time: they stay in a processor's cache.
const CONVERTED: usize = 1 << 15;

/// Elements of a mapped buffer for parameters of up to `largest` elements: an even number, since two may share a word.
fn piece(largest: usize) -> usize {
    PIECE.min(largest.next_multiple_of(2))
}

/// Bytes that loading takes on a device for a while, beside all that a plan allocates.
pub(super) fn memory(largest: usize) -> u64 {
    RING as u64 * 4 * piece(largest) as u64
}

impl Executor {
    /// Sets every weight of the model itself from the tensor of the same name.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`](crate::error::Error::Checkpoint) that lists every tensor that is missing, left over or of
    /// another shape, before any weight is set; those of a device.
    pub async fn load(&mut self, tensors: &Tensors) -> Result<()> {
        self.load_all(tensors, |parameter| !parameter.is_lora()).await
    }

    /// Sets every matrix of the adapter from the tensors of an open adapter.
    ///
    /// # Errors
    ///
    /// As [`Executor::load`].
    pub async fn load_adapter(&mut self, tensors: &Tensors) -> Result<()> {
        self.load_all(tensors, Parameter::is_lora).await
    }

    /// Sets every weight from the seed.
    pub async fn initialise(&mut self, seed: u64) -> Result<()> {
        self.initialise_all(seed, |parameter| parameter.tied_to.is_none()).await
    }

    /// Sets the matrices of a new adapter: with B zero, the model computes what it did.
    pub async fn initialise_adapter(&mut self, seed: u64) -> Result<()> {
        self.initialise_all(seed, Parameter::is_lora).await
    }

    async fn initialise_all(&mut self, seed: u64, belongs: impl Fn(&Parameter) -> bool) -> Result<()> {
        let all: Vec<Parameter> = self.parameters().iter().filter(|p| belongs(p)).cloned().collect();
        for parameter in all {
            let values = init::initial(&parameter, seed);
            self.write(&parameter.name, Part::Weight, &values).await?;
        }
        Ok(())
    }

    /// Sets the parameters that `belongs` picks from tensors that must be exactly those.
    async fn load_all(&mut self, tensors: &Tensors, belongs: impl Fn(&Parameter) -> bool) -> Result<()> {
        let all: Vec<Parameter> = self.parameters().iter().filter(|p| belongs(p)).cloned().collect();
        let expected: Vec<(String, Vec<usize>)> =
            all.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        let tied: Vec<String> = all.iter().filter(|p| p.tied_to.is_some()).map(|p| p.name.clone()).collect();
        tensors.check(&expected, &tied)?;
        let mut own = self.in_turn(all.iter().filter(|p| p.tied_to.is_none()))?.into_iter().peekable();
        let mut loader = Loader::new(self)?;
        while let Some(parameter) = own.next() {
            own.peek().inspect(|next| tensors.expect(&next.name));
            loader.load(tensors, &parameter.name, &parameter.name, Part::Weight).await?;
        }
        loader.finish().await
    }

    /// Parameters in an order in which every device gets its own as evenly as may be: while one copies, another does.
    fn in_turn<'a>(&self, parameters: impl Iterator<Item = &'a Parameter>) -> Result<Vec<&'a Parameter>> {
        // Elements that each device gets before a parameter of its own.
        let mut given = vec![0; self.devices.len()];
        let mut order = Vec::new();
        for parameter in parameters {
            let parts = self.parts_of(&parameter.name, parameter.len())?;
            let held = parts.first().map(|part| self.places(part, Part::Weight));
            let rank = held.and_then(|held| held.first().map(|held| held.rank)).unwrap_or(0);
            order.push((given[rank], parameter));
            given[rank] += parameter.len();
        }
        order.sort_by_key(|&(before, _)| before);
        Ok(order.into_iter().map(|(_, parameter)| parameter).collect())
    }

    /// Sets part of a parameter from a tensor.
    pub async fn load_part(&mut self, tensors: &Tensors, tensor: &str, name: &str, part: Part) -> Result<()> {
        let mut loader = Loader::new(self)?;
        loader.load(tensors, tensor, name, part).await?;
        loader.finish().await
    }
}

impl Rank {
    /// Copies what is in a mapped buffer over elements of part of a parameter, from the given even one on. Answers when the
    /// buffer is mapped again; until then the rank goes on.
    pub(super) async fn place(
        &mut self,
        (name, part, dtype): (&str, Part, DType),
        first: usize,
        from: Range,
        replies: &Replies,
    ) -> Result<()> {
        let (to, held) = self.parameters.part(name, part)?.held_as(dtype)?;
        from.buffer.unmap();
        let mut recorder = self.device.record();
        let offset = to.offset + dtype.bytes(first - held.start);
        recorder.copy(&from.buffer, from.offset, &to.buffer, offset, from.bytes);
        recorder.submit(|| ());
        let (rank, replies) = (self.index, replies.clone());
        from.buffer.clone().map(Mapping::Write, move || {
            // An executor that is gone loads no more.
            let _ = replies.unbounded_send((rank, Ok(Reply::Placed(from.buffer))));
        });
        self.device.check("loading")
    }
}

/// Mapped buffers of every device: while a device copies what is in one, the next is filled from the file.
struct Loader<'a> {
    executor: &'a mut Executor,
    /// Elements of a buffer.
    piece: usize,
    /// For each rank those that are mapped.
    free: Vec<Vec<Buffer>>,
    /// How many are with the ranks.
    away: usize,
    /// What a file's elements are converted to on their way to mapped memory, which may be slow to read or uncached.
    converted: Vec<f32>,
    packed: Vec<u16>,
}

impl<'a> Loader<'a> {
    fn new(executor: &'a mut Executor) -> Result<Loader<'a>> {
        let largest = executor.parameters().iter().map(Parameter::len).max().unwrap_or(0);
        let piece = piece(largest);
        let buffer = |device: &Device| device.staging("upload", 4 * piece as u64, Mapping::Write);
        let ring = |device: &Device| (0..RING).map(|_| buffer(device)).collect::<Result<Vec<_>>>();
        let free = executor.devices.iter().map(ring).collect::<Result<_>>()?;
        Ok(Loader {
            executor,
            piece,
            free,
            away: 0,
            converted: vec![0.0; CONVERTED],
            packed: vec![0; CONVERTED],
        })
    }

    async fn load(&mut self, tensors: &Tensors, tensor: &str, name: &str, part: Part) -> Result<()> {
        let len = tensors.get(tensor).map_or(0, |info| info.len());
        for parameter in self.executor.parts_of(name, len)? {
            self.load_piece(tensors, tensor, &parameter, part).await?;
        }
        Ok(())
    }

    /// What devices have of a parameter, be it all of it or a part.
    async fn load_piece(
        &mut self,
        tensors: &Tensors,
        tensor: &str,
        parameter: &Parameter,
        part: Part,
    ) -> Result<()> {
        let len = parameter.len();
        if let Some(store) = self.executor.store.clone() {
            for start in (0..len).step_by(CONVERTED) {
                let runs = parameter.runs_of_part(start..len.min(start + CONVERTED));
                let count = read(&runs, &mut self.converted, |run, to| tensors.read(tensor, run, to))?;
                store.write(&parameter.name, part, start, &self.converted[..count])?;
            }
        }
        for Held { rank, name, types } in self.executor.places(parameter, part) {
            for (dtype, held) in types {
                for first in held.clone().step_by(self.piece) {
                    let buffer = self.take(rank).await?;
                    let piece = first..held.end.min(first + self.piece);
                    let runs = parameter.runs_of_part(piece.clone());
                    if let [run] = &runs[..]
                        && is_stored(tensors, tensor, dtype, piece.len())
                    {
                        copy(tensors, tensor, run.whole.clone(), &buffer)?;
                    } else {
                        for start in piece.clone().step_by(CONVERTED) {
                            let runs = parameter.runs_of_part(start..piece.end.min(start + CONVERTED));
                            let bytes = self.convert(tensors, tensor, &runs, dtype)?;
                            buffer.write_mapped(dtype.bytes(start - first), bytes)?;
                        }
                    }
                    let filled = buffer.range(0, dtype.bytes(piece.len()));
                    self.executor.tell(rank, Command::Place(name.clone(), part, dtype, first, filled))?;
                    self.away += 1;
                }
            }
        }
        Ok(())
    }

    /// Elements of a tensor, from an even one of the part on, as the words of a device.
    fn convert(&mut self, tensors: &Tensors, tensor: &str, runs: &[Run], dtype: DType) -> Result<&[u8]> {
        if dtype != DType::BF16 {
            let count = read(runs, &mut self.converted, |run, to| tensors.read(tensor, run, to))?;
            return Ok(bytemuck::cast_slice(&self.converted[..count]));
        }
        let count = read(runs, &mut self.packed, |run, to| tensors.read_bf16(tensor, run, to))?;
        let whole = count.next_multiple_of(2);
        self.packed[count..whole].fill(0);
        Ok(bytemuck::cast_slice(&self.packed[..whole]))
    }

    /// A mapped buffer of this rank, once it has one.
    async fn take(&mut self, rank: usize) -> Result<Buffer> {
        loop {
            if let Some(buffer) = self.free[rank].pop() {
                return Ok(buffer);
            }
            self.receive().await?;
        }
    }

    async fn receive(&mut self) -> Result<()> {
        if let (rank, Reply::Placed(buffer)) = self.executor.answer().await? {
            self.free[rank].push(buffer);
            self.away -= 1;
        }
        Ok(())
    }

    /// Waits until everything is in place.
    async fn finish(mut self) -> Result<()> {
        while self.away > 0 {
            self.receive().await?;
        }
        Ok(())
    }
}

/// Reads runs of a tensor one after another; how many elements they are.
fn read<T>(
    runs: &[Run],
    to: &mut [T],
    each: impl Fn(std::ops::Range<usize>, &mut [T]) -> Result<()>,
) -> Result<usize> {
    let mut at = 0;
    for run in runs {
        each(run.whole.clone(), &mut to[at..at + run.whole.len()])?;
        at += run.whole.len();
    }
    Ok(at)
}

/// Whether a tensor's file holds so many elements as a device will: in whole words of the same type.
fn is_stored(tensors: &Tensors, tensor: &str, dtype: DType, elements: usize) -> bool {
    let stored = match dtype {
        DType::BF16 => Dtype::BF16,
        DType::F32 | DType::U32 => Dtype::F32,
    };
    let words = (stored.size() * elements) as u64 == dtype.bytes(elements);
    cfg!(target_endian = "little") && words && tensors.get(tensor).is_some_and(|info| info.dtype == stored)
}

/// Copies elements from the file into a mapped buffer.
fn copy(tensors: &Tensors, tensor: &str, elements: std::ops::Range<usize>, buffer: &Buffer) -> Result<()> {
    let (mut at, mut written) = (0, Ok(()));
    tensors.raw(tensor, elements, |bytes| {
        if written.is_ok() {
            written = buffer.write_mapped(at, bytes);
            at += bytes.len() as u64;
        }
    })?;
    written
}
