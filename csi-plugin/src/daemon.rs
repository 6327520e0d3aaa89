//! The daemon, as the plugin asks it: over its unix socket, connected to when needed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use weightd_proto::weightd::v1::control_client::ControlClient;
use weightd_proto::weightd::v1::{
    AcquireEvent, AcquireRequest, HoldRequest, ReleaseRequest, Volume, VolumesRequest,
};

/// How long a question that needs no origin may take: 10 s. The daemon may be busy collecting.
const QUESTION: Duration = Duration::from_secs(10);

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);

/// The daemon of this node.
#[derive(Debug, Clone)]
pub struct Daemon {
    client: ControlClient<Channel>,
    socket: PathBuf,
}

impl Daemon {
    /// The daemon at `socket`, which need not run yet.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is never looked up: the connector goes to the socket.
        let endpoint = Endpoint::from_static("http://weightd").connect_timeout(CONNECT);
        let channel = endpoint.connect_with_connector_lazy(connector);
        Self {
            client: ControlClient::new(channel).max_decoding_message_size(usize::MAX),
            socket: socket.to_owned(),
        }
    }

    /// Asks for a volume; the stream reports progress and ends with what to mount.
    ///
    /// # Errors
    ///
    /// What the daemon answers; `UNAVAILABLE` if it does not.
    pub async fn acquire(
        &self,
        request: AcquireRequest,
    ) -> Result<tonic::Streaming<AcquireEvent>, Status> {
        let mut client = self.client.clone();
        self.question(client.acquire(request)).await
    }

    /// Lets go of all that `holder` holds.
    ///
    /// # Errors
    ///
    /// As [`Daemon::acquire`].
    pub async fn release(&self, holder: &str) -> Result<(), Status> {
        let mut client = self.client.clone();
        let request = ReleaseRequest {
            holder: holder.to_owned(),
        };
        self.question(client.release(request)).await.map(drop)
    }

    /// What the holders of volumes hold.
    ///
    /// # Errors
    ///
    /// As [`Daemon::acquire`].
    pub async fn volumes(&self) -> Result<Vec<Volume>, Status> {
        let mut client = self.client.clone();
        let volumes = self.question(client.volumes(VolumesRequest {})).await?;
        Ok(volumes.volumes)
    }

    /// Pins what `holder` has mounted. False if that snapshot is not here.
    ///
    /// # Errors
    ///
    /// As [`Daemon::acquire`].
    pub async fn hold(&self, holder: &str, snapshot: &str) -> Result<bool, Status> {
        let mut client = self.client.clone();
        let request = HoldRequest {
            holder: holder.to_owned(),
            snapshot: snapshot.to_owned(),
        };
        Ok(self.question(client.hold(request)).await?.held)
    }

    async fn question<T>(
        &self,
        answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, Status> {
        match tokio::time::timeout(QUESTION, answer).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.readable(status)),
            Err(_) => Err(self.away(&format!("no answer within {} s", QUESTION.as_secs()))),
        }
    }

    /// An error of the connection in words; the daemon's own answers are left as they are.
    #[must_use]
    pub fn readable(&self, status: Status) -> Status {
        let mut cause = std::error::Error::source(&status);
        let mut last = None;
        while let Some(error) = cause {
            last = Some(error.to_string());
            cause = error.source();
        }
        match (last, status.code()) {
            (Some(last), _) => self.away(&last),
            // The daemon went away in the middle.
            (None, Code::Unknown | Code::Cancelled) => self.away(status.message()),
            (None, _) => status,
        }
    }

    fn away(&self, cause: &str) -> Status {
        Status::unavailable(format!(
            "the weightd daemon at {} does not answer: {cause}\nhint: `kubectl logs` of the weightd container on \
             this node says why; the volume is tried again",
            self.socket.display()
        ))
    }
}
