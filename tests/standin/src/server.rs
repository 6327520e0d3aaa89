//! Sockets and the tasks that serve them.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::thread::JoinHandle;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinSet};

use crate::outgoing::Outgoing;

/// How long to wait after a failed accept, which is for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a thread that still reads a file may keep a dropped origin from being gone.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) fn bind(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Serves `listener` until the returned handle is aborted; its connections die with it.
pub(crate) fn serve<H, F>(listener: TcpListener, handler: H) -> io::Result<AbortHandle>
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Outgoing>> + Send + 'static,
{
    let listener = tokio::net::TcpListener::from_std(listener)?;
    Ok(tokio::spawn(accept(listener, handler)).abort_handle())
}

async fn accept<H, F>(listener: tokio::net::TcpListener, handler: H)
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Outgoing>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Without it the last segment of a response may wait 40 ms for an acknowledgement.
        let _ = stream.set_nodelay(true);
        let handler = handler.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let answer = handler(request);
                async move { Ok::<_, io::Error>(answer.await) }
            });
            // An error is the client's going away or a fault that was asked for.
            let _ = http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

/// Keeps an origin running until dropped.
#[derive(Debug)]
pub(crate) enum Owner {
    Tasks(Vec<AbortHandle>),
    Thread {
        stop: Option<oneshot::Sender<()>>,
        thread: Option<JoinHandle<()>>,
    },
}

impl Drop for Owner {
    fn drop(&mut self) {
        match self {
            Self::Tasks(tasks) => tasks.iter().for_each(AbortHandle::abort),
            Self::Thread { stop, thread } => {
                if let Some(stop) = stop.take() {
                    let _ = stop.send(());
                }
                if let Some(thread) = thread.take() {
                    let _ = thread.join();
                }
            }
        }
    }
}

/// Calls `start` on a runtime in a thread of its own, which runs until the owner is dropped.
pub(crate) fn spawn_thread<T, S>(start: S) -> io::Result<(T, Owner)>
where
    T: Send + 'static,
    S: FnOnce() -> io::Result<(T, Vec<AbortHandle>)> + Send + 'static,
{
    let (started, outcome) = std::sync::mpsc::channel();
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::Builder::new()
        .name("standin".to_owned())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build();
            let runtime = match runtime {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = started.send(Err(error));
                    return;
                }
            };
            runtime.block_on(async move {
                let _ = started.send(start().map(|(value, _)| value));
                let _ = stopped.await;
            });
            // Waits until the tasks, and with them the sockets, are gone.
            runtime.shutdown_timeout(STOP_TIMEOUT);
        })?;
    let owner = Owner::Thread {
        stop: Some(stop),
        thread: Some(thread),
    };
    let value = outcome
        .recv()
        .map_err(|_| io::Error::other("the stand-in's thread ended"))??;
    Ok((value, owner))
}
