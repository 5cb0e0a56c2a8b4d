//! An opened adapter: buffers, kernels, submissions, errors, and how a thread waits for it.

use std::collections::HashMap;
#[cfg(not(target_arch = "wasm32"))]
use std::sync::OnceLock;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

#[cfg(not(target_arch = "wasm32"))]
use super::pipelines::Pipelines;
use super::state::{Failure, State};
use super::{AdapterInfo, BindGroup, Buffer, Kernel, KernelKey, Mapping, Range, Recorder, adapter};
#[cfg(not(target_arch = "wasm32"))]
use crate::error::said;
use crate::error::{Error, Result};

/// Bytes of the blocks from which drivers' memory is shared out to smaller buffers. Larger ones have their own, so that what a device
/// takes is what was planned; blocks of up to 256 MiB, as usual, stand half empty behind large tensors.
const MEMORY_BLOCK: u64 = 4 << 20;

/// How to open an adapter.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Leave out bounds checks and loop limits in shaders: for release builds. Tests run with the checks on.
    pub trusted_shaders: bool,
    /// Look at OpenGL adapters too.
    pub gl: bool,
    /// What is not to be used, even where the adapter has it.
    pub without: Without,
}

/// Features of adapters that nothing depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Without {
    /// 16-bit floats in shaders.
    pub f16: bool,
    /// Subgroup operations.
    pub subgroups: bool,
    /// Cooperative matrices, which take 16-bit floats.
    pub cooperative: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { trusted_shaders: !cfg!(debug_assertions), gl: false, without: Without::default() }
    }
}

/// What the choice of a kernel variant may depend on. It never depends on the cut or the schedule: the same op on the
/// same adapter always runs the same kernel, so results do not depend on the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Runs on the CPU: barriers are dear and memory is cached.
    pub software: bool,
    /// The fixed subgroup size, where there is one and subgroup operations work.
    pub subgroup: Option<u32>,
    /// There are 16-bit floats in shaders.
    pub has_f16: bool,
    /// Matmuls round their operands to f16 and sum in f32.
    pub f16: bool,
    /// Rows and columns of the matrices of f16, summed in f32, that a subgroup multiplies together; 0 where there are none.
    pub cooperative: u32,
    /// Running sums that an invocation keeps in registers: what compilers hold without spilling (docs/kernels.md).
    pub sums: u32,
    /// Workgroups of 256 that keep every core busy.
    pub fill: u32,
    /// Short loops are written out: a card's compiler schedules them better, a driver on a CPU compiles them for seconds.
    pub written_out: bool,
    /// The tiles of matmuls that were measured to be fastest.
    pub tiles: Tiles,
    /// Floating-point operations of one dispatch, where it can be cut.
    pub dispatch: u64,
    /// Bytes one binding may have.
    pub max_binding: u64,
    /// Bytes one buffer may have.
    pub max_buffer: u64,
    /// Workgroups along one axis of a dispatch.
    pub max_groups: u32,
}

/// Numbers of tiles by layout of the matmul and by size of its result, from small to large; 0 where nothing was measured, and the
/// table decides. Which tile it is changes no bit of a result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tiles(pub [[u8; 3]; 3]);

/// The longest that a message from another device waits while this one works. Where the work is done by the cores that look for
/// messages, looking less often leaves them more time for it.
#[cfg(not(target_arch = "wasm32"))]
const REACTION: std::time::Duration = std::time::Duration::from_micros(200);
#[cfg(not(target_arch = "wasm32"))]
const SOFTWARE_REACTION: std::time::Duration = std::time::Duration::from_millis(1);

/// Whether a panic is the way in which wgpu says, to a thread that waits for a device, that the device is lost. [`Device`]
/// catches it and makes an error of it, so that there is no more to be said of it.
#[cfg(not(target_arch = "wasm32"))]
pub fn is_caught(panic: &std::panic::PanicHookInfo) -> bool {
    panic.payload_as_str().is_some_and(|text| text.starts_with("Error in Device::poll"))
}

/// An opened adapter, and what the choice of its kernels depends on. Cloning clones the handle.
#[derive(Clone, Debug)]
pub struct Device(Arc<Inner>, Capabilities);

struct Inner {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: AdapterInfo,
    trusted: bool,
    kernels: Mutex<HashMap<KernelKey, Arc<Kernel>>>,
    state: Arc<State>,
    /// Held by the thread that polls.
    #[cfg(not(target_arch = "wasm32"))]
    polling: Mutex<()>,
    #[cfg(not(target_arch = "wasm32"))]
    pipelines: OnceLock<Pipelines>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({})", self.info.name)
    }
}

impl Device {
    /// Opens the adapter with this index in the list, in an instance of its own.
    #[cfg_attr(
        target_arch = "wasm32",
        expect(clippy::arc_with_non_send_sync, reason = "one thread there, and threads everywhere else")
    )]
    pub async fn open(index: usize, options: OpenOptions) -> Result<Device> {
        let mut found = adapter::found(options.gl).await;
        if found.is_empty() {
            return Err(adapter::none_found());
        }
        if index >= found.len() {
            return Err(Error::AdapterIndex { index, count: found.len() });
        }
        let (adapter, mut info) = found.swap_remove(index);
        drop(found);
        let Without { f16, subgroups, cooperative } = options.without;
        info.f16 &= !f16;
        info.subgroups &= !subgroups;
        let cooperative = if f16 || subgroups || cooperative { 0 } else { adapter::cooperative(&adapter) };
        let mut wanted = wgpu::Features::empty();
        wanted.set(wgpu::Features::SUBGROUP, !subgroups);
        wanted.set(wgpu::Features::SHADER_F16, !f16);
        wanted.set(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, cooperative > 0);
        wanted.set(wgpu::Features::PIPELINE_CACHE, true);
        #[cfg(target_arch = "wasm32")]
        super::browser::prepare();
        let limits = adapter.limits();
        let request = adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("polystage"),
            required_features: adapter.features() & wanted,
            required_limits: limits.clone(),
            // SAFETY: what is experimental is used by one kernel, which is checked before anything is computed with it.
            experimental_features: match cooperative {
                0 => wgpu::ExperimentalFeatures::disabled(),
                _ => unsafe { wgpu::ExperimentalFeatures::enabled() },
            },
            memory_hints: wgpu::MemoryHints::Manual {
                suballocated_device_memory_block_size: MEMORY_BLOCK..MEMORY_BLOCK,
            },
            ..Default::default()
        });
        let title = format!("adapter {} ({})", info.index, info.name);
        let (device, queue) = request
            .await
            .map_err(|e| Failure::worded(e.to_string(), Failure::Other).error(&title, "opening it"))?;
        let state = State::new(title);
        let failed = state.clone();
        device.on_uncaptured_error(Arc::new(move |error| failed.fail(Failure::reported(&error))));
        let lost = state.clone();
        device.set_device_lost_callback(move |reason, words| {
            let words = if words.is_empty() { format!("{reason:?}") } else { words };
            lost.fail(Failure::worded(words, Failure::Lost));
        });
        #[cfg(target_arch = "wasm32")]
        let subgroups = !subgroups && super::browser::subgroups_granted();
        #[cfg(not(target_arch = "wasm32"))]
        let subgroups = device.features().contains(wgpu::Features::SUBGROUP);
        let fixed = info.subgroup_size[0] == info.subgroup_size[1] && info.subgroup_size[0] >= 4;
        let capabilities = Capabilities {
            software: info.software,
            subgroup: (subgroups && fixed).then_some(info.subgroup_size[0]),
            has_f16: info.f16,
            f16: false,
            cooperative,
            sums: adapter::sums(info.vendor_id),
            fill: if info.software { 1 } else { adapter::FILL },
            written_out: !info.software,
            tiles: Tiles::default(),
            dispatch: adapter::DISPATCH,
            max_binding: limits.max_storage_buffer_binding_size,
            max_buffer: limits.max_buffer_size,
            max_groups: limits.max_compute_workgroups_per_dimension,
        };
        let kernels = Mutex::new(HashMap::new());
        let trusted = options.trusted_shaders;
        let inner = Inner {
            device,
            queue,
            info,
            trusted,
            kernels,
            state,
            #[cfg(not(target_arch = "wasm32"))]
            polling: Mutex::new(()),
            #[cfg(not(target_arch = "wasm32"))]
            pipelines: OnceLock::new(),
        };
        Ok(Device(Arc::new(inner), capabilities))
    }

    /// The same opened adapter, whose kernels are chosen as for these capabilities. It must have all that they say.
    pub fn with(&self, capabilities: Capabilities) -> Device {
        Device(self.0.clone(), capabilities)
    }

    /// The adapter.
    pub fn info(&self) -> &AdapterInfo {
        &self.0.info
    }

    /// What kernel choices depend on.
    pub fn capabilities(&self) -> &Capabilities {
        &self.1
    }

    pub(super) fn raw(&self) -> &wgpu::Device {
        &self.0.device
    }

    /// Takes the device away, as when its card is unplugged; it should have nothing to do.
    pub fn lose(&self) {
        self.0.device.destroy();
        #[cfg(not(target_arch = "wasm32"))]
        self.poll(std::time::Duration::ZERO);
    }

    /// Resolves when every kernel that was asked for can be used: in a browser that is later. Elsewhere those that are to be kept
    /// are handed over ([`Device::keep_kernels`]).
    ///
    /// # Errors
    /// Those of [`Device::check`].
    pub async fn compiled(&self) -> Result<()> {
        #[cfg(target_arch = "wasm32")]
        if let Some(words) = super::browser::compiled().await {
            self.0.state.fail(Failure::worded(words, Failure::Other));
            return self.check("compiling its kernels");
        }
        #[cfg(not(target_arch = "wasm32"))]
        self.0.pipelines.get().into_iter().for_each(Pipelines::hand_over);
        Ok(())
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn pipelines(&self) -> &OnceLock<Pipelines> {
        &self.0.pipelines
    }

    /// Resolves after so many seconds, in which the device goes on.
    pub async fn pause(&self, seconds: f64) {
        #[cfg(target_arch = "wasm32")]
        super::browser::timer(seconds).await;
        #[cfg(not(target_arch = "wasm32"))]
        {
            let end = super::now() + seconds;
            std::future::poll_fn(|context| {
                if super::now() >= end {
                    return std::task::Poll::Ready(());
                }
                // Short, so that the thread still hears of what its device has done.
                std::thread::sleep(std::time::Duration::from_millis(1));
                context.waker().wake_by_ref();
                std::task::Poll::Pending
            })
            .await;
        }
    }

    pub(super) fn trusted(&self) -> bool {
        self.0.trusted
    }

    /// The first failure of the device, if it has failed, as that of what it is `doing`.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::OutOfMemory`], and [`Error::Gpu`] for all others.
    pub fn check(&self, doing: &str) -> Result<()> {
        self.0.state.error(doing).map_or(Ok(()), Err)
    }

    /// Runs a future that waits for the device, or for others that wait for it, until the device fails: what a failed
    /// device was to do may never come to an end. `doing` says then what that was.
    ///
    /// # Errors
    /// As [`Device::check`].
    pub async fn unless_failed<T>(
        &self,
        doing: impl Fn() -> String,
        future: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut future = std::pin::pin!(future);
        std::future::poll_fn(|context| match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(output),
            Poll::Pending => self.0.state.failed(context, &doing).map(Err),
        })
        .await
    }

    /// Bytes of this device's living buffers: the ledger.
    pub fn allocated(&self) -> u64 {
        self.0.state.allocated()
    }

    fn allocate(&self, label: &str, bytes: u64, usage: wgpu::BufferUsages, mapped: bool) -> Result<Buffer> {
        let size = bytes.next_multiple_of(4).max(16);
        if size > self.1.max_buffer {
            return Err(Error::Binding {
                tensor: label.into(),
                adapter: self.0.info.name.clone(),
                need: size,
                limit: self.1.max_buffer,
                help: None,
            });
        }
        let raw = self.0.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size,
            usage,
            mapped_at_creation: mapped,
        });
        self.check(&format!("allocating {size} bytes for {label}"))?;
        Ok(Buffer::new(raw, self.0.state.lease(size)))
    }

    /// A buffer for kernels, zero at first.
    pub fn buffer(&self, label: &str, bytes: u64) -> Result<Buffer> {
        use wgpu::BufferUsages as U;
        self.allocate(label, bytes, U::STORAGE | U::COPY_SRC | U::COPY_DST, false)
    }

    /// A buffer of kernel parameters with this content.
    pub fn uniform(&self, label: &str, bytes: &[u8]) -> Result<Buffer> {
        use wgpu::BufferUsages as U;
        let buffer = self.allocate(label, bytes.len() as u64, U::UNIFORM | U::COPY_DST, false)?;
        self.upload(&buffer, 0, bytes);
        Ok(buffer)
    }

    /// A host-visible buffer for copies in one direction; one for writing starts mapped.
    pub fn staging(&self, label: &str, bytes: u64, mapping: Mapping) -> Result<Buffer> {
        use wgpu::BufferUsages as U;
        match mapping {
            Mapping::Read => self.allocate(label, bytes, U::MAP_READ | U::COPY_DST, false),
            Mapping::Write => self.allocate(label, bytes, U::MAP_WRITE | U::COPY_SRC, true),
        }
    }

    /// Writes host bytes before the next submission. Length and offset are multiples of 4.
    pub fn upload(&self, buffer: &Buffer, offset: u64, bytes: &[u8]) {
        self.0.queue.write_buffer(&buffer.raw, offset, bytes);
    }

    /// The pipeline of a kernel variant, compiled at first use.
    pub fn kernel(&self, key: &KernelKey) -> Result<Arc<Kernel>> {
        let known = || self.0.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = known().get(key) {
            return Ok(kernel.clone());
        }
        let kernel = Arc::new(Kernel::compile(self, key)?);
        known().insert(key.clone(), kernel.clone());
        Ok(kernel)
    }

    /// Binds ranges to binding numbers 0, 1, 2 ….
    pub fn bind(&self, kernel: &Kernel, ranges: &[Range]) -> BindGroup {
        let entries: Vec<wgpu::BindGroupEntry> = ranges
            .iter()
            .enumerate()
            .map(|(i, range)| wgpu::BindGroupEntry { binding: i as u32, resource: range.binding() })
            .collect();
        let layout = &kernel.layout;
        let descriptor = wgpu::BindGroupDescriptor { label: None, layout, entries: &entries };
        BindGroup {
            raw: self.0.device.create_bind_group(&descriptor),
            _buffers: ranges.iter().map(|range| range.buffer.clone()).collect(),
        }
    }

    /// Starts a submission.
    pub fn record(&self) -> Recorder<'_> {
        Recorder::new(self)
    }

    pub(super) fn submit(&self, commands: wgpu::CommandBuffer, done: impl FnOnce() + Send + 'static) {
        self.0.state.submitted(self.0.queue.submit([commands]));
        let state = self.0.state.clone();
        self.0.queue.on_submitted_work_done(move || {
            done();
            state.finished();
        });
    }

    /// Submissions that have not finished.
    pub fn in_flight(&self) -> usize {
        self.0.state.in_flight()
    }

    /// Resolves when fewer than `limit` submissions are unfinished, or the device has failed.
    pub async fn below(&self, limit: usize) {
        std::future::poll_fn(|context| self.0.state.below(limit, context)).await
    }

    /// Reads part of a buffer back.
    pub async fn read(&self, range: &Range) -> Result<Vec<u8>> {
        let staging = self.staging("read-back", range.bytes, Mapping::Read)?;
        let mut recorder = self.record();
        recorder.copy(&range.buffer, range.offset, &staging, 0, range.bytes);
        recorder.submit(|| ());
        let bytes = self.read_staging(&staging, range.bytes).await?;
        Ok(bytes)
    }

    /// Maps a read-back buffer, copies its first bytes out and unmaps it.
    pub async fn read_staging(&self, staging: &Buffer, bytes: u64) -> Result<Vec<u8>> {
        self.mapped(staging, Mapping::Read).await?;
        let data = staging.range(0, bytes).read_mapped()?;
        staging.unmap();
        Ok(data)
    }

    /// Maps a buffer and waits until it is mapped.
    pub async fn mapped(&self, buffer: &Buffer, mapping: Mapping) -> Result<()> {
        let (sender, receiver) = futures_channel::oneshot::channel();
        buffer.map(mapping, move || {
            let _ = sender.send(());
        });
        let mapped = async {
            if receiver.await.is_err() {
                // What cannot be mapped has failed the device, which is what ends the waiting.
                std::future::pending::<()>().await;
            }
            Ok(())
        };
        self.unless_failed(|| "mapping a buffer".into(), mapped).await
    }

    /// Reads 32-bit floats back.
    pub async fn read_f32(&self, range: &Range) -> Result<Vec<f32>> {
        let bytes = self.read(range).await?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    /// Lets callbacks run, waiting a little while there is unfinished work. One thread at a time: of two that wait for the
    /// same submission, wgpu tells one that it is not done when the other has just cleared it, and trips over that.
    #[cfg(not(target_arch = "wasm32"))]
    fn poll(&self, timeout: std::time::Duration) {
        use std::panic::{AssertUnwindSafe, catch_unwind};

        let Ok(_polling) = self.0.polling.try_lock() else {
            // The other thread runs the callbacks of all, which wake this one.
            return std::thread::park_timeout(timeout);
        };
        let failure = self.0.state.failure();
        if failure.is_some() {
            // Its submissions may never finish, and have to be waited for no more.
            std::thread::park_timeout(timeout);
        }
        let poll = match self.0.state.oldest() {
            _ if matches!(failure, Some(Failure::Lost(_))) => return,
            Some(index) if failure.is_none() => {
                wgpu::PollType::Wait { submission_index: Some(index), timeout: Some(timeout) }
            }
            _ => wgpu::PollType::Poll,
        };
        self.0.state.fail(match catch_unwind(AssertUnwindSafe(|| self.0.device.poll(poll))) {
            // A time-out is no error: the caller looks at its future and comes back.
            Ok(Ok(_) | Err(wgpu::PollError::Timeout)) => return,
            Ok(Err(wgpu::PollError::WrongSubmissionIndex(..))) => {
                Failure::Silent("it has refused a submission")
            }
            Err(panic) => Failure::worded(said(&*panic).into(), Failure::Other),
        });
    }

    /// Runs a future on this thread while keeping this device going: the explicit blocking wrapper around the async
    /// core. It sleeps in the driver while work is unfinished, else until it is woken.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        use std::sync::atomic::{AtomicBool, Ordering};
        use std::time::Duration;

        struct Unpark(std::thread::Thread, AtomicBool);
        impl std::task::Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.1.store(true, Ordering::Release);
                self.0.unpark();
            }
        }
        let unpark = Arc::new(Unpark(std::thread::current(), AtomicBool::new(false)));
        let waker = std::task::Waker::from(unpark.clone());
        let mut context = std::task::Context::from_waker(&waker);
        let mut future = std::pin::pin!(future);
        loop {
            if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return output;
            }
            while !unpark.1.swap(false, Ordering::Acquire) {
                // A message from another device must not wait long behind this one's work, nor may a map
                // callback that needs no submission wait for ever.
                if self.in_flight() > 0 {
                    self.poll(if self.1.software { SOFTWARE_REACTION } else { REACTION });
                } else {
                    self.poll(Duration::ZERO);
                    if !unpark.1.load(Ordering::Acquire) {
                        std::thread::park_timeout(Duration::from_millis(5));
                    }
                }
            }
        }
    }
}
