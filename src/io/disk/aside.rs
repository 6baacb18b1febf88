//! A thread beside an owner thread, for what takes long by its nature: zeroing, giving space back, digests. Requests do not wait for
//! the processor behind it.
//!
//! It is a tokio-uring runtime, whose cost for each operation does not count here.

use std::future::Future;
use std::io;
use std::pin::Pin;

use tokio::sync::{mpsc, oneshot};

use crate::limits;

type Job = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// Where jobs for the thread are left. It ends with this, once its jobs have ended.
pub struct Aside {
    jobs: mpsc::Sender<Job>,
}

impl Aside {
    /// Starts the thread.
    pub fn start(name: String) -> io::Result<Aside> {
        let (jobs, mut queue) = mpsc::channel::<Job>(limits::ASIDE_JOBS_MAX);
        std::thread::Builder::new().name(name).spawn(move || {
            tokio_uring::builder().entries(limits::ASIDE_RING_ENTRIES).start(async move {
                while let Some(job) = queue.recv().await {
                    tokio_uring::spawn(job());
                }
            });
        })?;
        Ok(Aside { jobs })
    }

    /// Has a job done by the thread. Panics when the job does.
    pub async fn run<T, F>(&self, job: impl FnOnce() -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (done, result) = oneshot::channel();
        let job = move || -> Pin<Box<dyn Future<Output = ()>>> {
            Box::pin(async move {
                // Who asked is there as long as its thread lives.
                let _ = done.send(job().await);
            })
        };
        let left = self.jobs.send(Box::new(job)).await;
        match (left, result.await) {
            (Ok(()), Ok(result)) => result,
            _ => panic!("the thread beside this one has panicked"),
        }
    }
}
