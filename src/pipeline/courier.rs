//! The host's copies for one receiving end of a link: what has arrived from its senders becomes a filled upload buffer.
//!
//! A rank orders what it will take, in that order. Where it knows that long before (between stages, at the end of a step) and
//! tensors are large, a thread of the link's own copies them as they arrive, while the rank records and its device works;
//! else the rank copies when it takes them, and in a browser, which has one thread, always. An order waits for nothing that comes
//! after it, so an end that runs ahead can hold up no other.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use futures_channel::mpsc;
use futures_util::{FutureExt, StreamExt, stream};

use super::link::{Combine, Filled, HostCopy, Message, Ring, closed, fill};
use crate::error::{Error, Result, said};
use crate::gpu::Buffer;
use crate::mesh::Wire;

/// Where one sender's tensors arrive.
pub(super) struct Source {
    filled: mpsc::UnboundedReceiver<Message>,
    early: HashMap<usize, Arc<Filled>>,
    /// Keeps the sender's ring open.
    _back: Arc<mpsc::UnboundedSender<Buffer>>,
}

impl Source {
    pub(super) fn new(
        filled: mpsc::UnboundedReceiver<Message>,
        back: Arc<mpsc::UnboundedSender<Buffer>>,
    ) -> Source {
        Source { filled, early: HashMap::new(), _back: back }
    }

    /// Waits for tensor number `tag`.
    pub(super) async fn wait(&mut self, tag: usize) -> Result<Arc<Filled>> {
        loop {
            if let Some(filled) = self.early.remove(&tag) {
                return Ok(filled);
            }
            let message = self.filled.next().await.ok_or_else(closed)?;
            self.early.insert(message.tag, message.filled);
        }
    }
}

/// What a rank will take.
pub(super) struct Order {
    pub(super) tag: usize,
    /// Bytes of the tensor, in f32.
    pub(super) bytes: u64,
    pub(super) combine: Combine,
    /// In what it travels.
    pub(super) wire: Wire,
}

/// What a rank can take: an upload buffer that its device may read.
pub(super) struct Ready {
    pub(super) buffer: Buffer,
    pub(super) copy: HostCopy,
}

/// What the copying needs.
pub(super) struct Collector {
    /// The senders: what arrives is the sum over groups of the sum over each group.
    pub(super) groups: Vec<Vec<Source>>,
    /// The upload ring.
    pub(super) free: Ring,
}

impl Collector {
    /// Waits for what is ordered and for a free buffer, and copies.
    async fn collect(&mut self, order: &Order) -> Result<Ready> {
        let mut groups = Vec::with_capacity(self.groups.len());
        for group in &mut self.groups {
            let mut arrived = Vec::with_capacity(group.len());
            for source in group {
                arrived.push(source.wait(order.tag).await?);
            }
            groups.push(arrived);
        }
        let buffer = self.free.next().await?;
        // A thread that died would take its sources along, and whoever sends would be heard before the reason.
        let filled = catch_unwind(AssertUnwindSafe(|| fill(&buffer, &groups, order)));
        let died = |panic: Box<dyn Any + Send>| {
            Error::failed("link", format!("its copy has died: {}; please report it", said(&*panic)))
        };
        let copy = filled.map_err(died)??;
        buffer.unmap();
        Ok(Ready { buffer, copy })
    }
}

#[cfg(not(target_arch = "wasm32"))]
type Copies = stream::BoxStream<'static, Result<Ready>>;
#[cfg(target_arch = "wasm32")]
type Copies = stream::LocalBoxStream<'static, Result<Ready>>;

/// Who copies.
pub(super) struct Courier {
    orders: mpsc::UnboundedSender<Order>,
    ready: Copies,
    /// What has been looked for and found.
    found: Option<Result<Ready>>,
    #[cfg(not(target_arch = "wasm32"))]
    thread: Option<native::Thread>,
}

impl Courier {
    /// The rank itself, when it takes what it has ordered.
    pub(super) fn new(collector: Collector) -> Courier {
        let (orders, inbox) = mpsc::unbounded();
        let next = |(mut collector, mut inbox): (Collector, mpsc::UnboundedReceiver<Order>)| async {
            let order = inbox.next().await?;
            let ready = collector.collect(&order).await;
            Some((ready, (collector, inbox)))
        };
        let copies = stream::unfold((collector, inbox), next);
        #[cfg(target_arch = "wasm32")]
        return Courier { orders, ready: copies.boxed_local(), found: None };
        #[cfg(not(target_arch = "wasm32"))]
        Courier { orders, ready: copies.boxed(), found: None, thread: None }
    }

    /// From now on a thread, where there are any.
    ///
    /// # Errors
    ///
    /// Where the system has none left.
    pub(super) fn start(&mut self) -> Result<()> {
        #[cfg(not(target_arch = "wasm32"))]
        if self.thread.is_none() {
            let copies = std::mem::replace(&mut self.ready, stream::empty().boxed());
            let (thread, ready) = native::Thread::start(copies)?;
            (self.thread, self.ready) = (Some(thread), ready.boxed());
        }
        Ok(())
    }

    /// Takes an order.
    pub(super) fn ask(&self, order: Order) {
        // One that has failed says so when it is asked for what it has.
        let _ = self.orders.unbounded_send(order);
    }

    /// Whether the next of what was ordered is there.
    pub(super) fn has_next(&mut self) -> bool {
        self.found = self.found.take().or_else(|| self.ready.next().now_or_never().flatten());
        self.found.is_some()
    }

    /// Waits for the next of what was ordered.
    pub(super) async fn next(&mut self) -> Result<Ready> {
        match self.found.take() {
            Some(found) => found,
            None => self.ready.next().await.ok_or_else(closed)?,
        }
    }
}

#[cfg(not(target_arch = "wasm32"))]
mod native {
    use std::thread::JoinHandle;

    use futures_util::future::{self, AbortHandle};

    use super::*;
    use crate::pipeline::launch;

    /// The link's thread, at whose end nothing of the link is held any more.
    pub(super) struct Thread {
        stop: AbortHandle,
        handle: Option<JoinHandle<()>>,
    }

    impl Thread {
        /// Sends what is copied.
        pub(super) fn start(copies: Copies) -> Result<(Thread, mpsc::UnboundedReceiver<Result<Ready>>)> {
            let (send, ready) = mpsc::unbounded();
            let serve = copies.for_each(move |ready| {
                // A rank that is gone stops this thread.
                let _ = send.unbounded_send(ready);
                future::ready(())
            });
            let (serve, stop) = future::abortable(serve);
            let handle = Some(launch::alone("link", serve.map(|_| ()))?);
            Ok((Thread { stop, handle }, ready))
        }
    }

    impl Drop for Thread {
        fn drop(&mut self) {
            self.stop.abort();
            let _ = self.handle.take().map(JoinHandle::join);
        }
    }
}
