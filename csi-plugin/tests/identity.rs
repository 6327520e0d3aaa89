//! The Identity service, called as kubelet and its sidecars call it.

use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant};
use tonic::transport::{Channel, Error};
use weightd_csi::daemon::Daemon;
use weightd_csi::endpoint::Endpoint;
use weightd_csi::mount::Workshop;
use weightd_csi::node::Node;
use weightd_csi::volume::KubeletDir;
use weightd_proto::csi::v1::identity_client::IdentityClient;
use weightd_proto::csi::v1::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, ProbeRequest, plugin_capability,
};

struct Plugin {
    endpoint: Endpoint,
    client: IdentityClient<Channel>,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<(), Error>>,
    _directory: tempfile::TempDir,
}

impl Plugin {
    async fn start() -> Self {
        let directory = tempfile::tempdir().expect("tempdir");
        let endpoint: Endpoint = format!("unix://{}/csi.sock", directory.path().display())
            .parse()
            .expect("endpoint");
        let listening = endpoint.listen().await.expect("listen");
        let (stop, stopped) = oneshot::channel::<()>();
        let daemon = Daemon::at(&directory.path().join("no-daemon.sock"));
        let kubelet = KubeletDir::new(directory.path()).expect("kubelet's directory");
        let workshop = Workshop::at(directory.path().join("mounts"));
        let node = Arc::new(Node::new(
            daemon,
            kubelet,
            workshop,
            None,
            "node-1".to_owned(),
        ));
        let served = tokio::spawn(weightd_csi::serve(listening, node, async move {
            stopped.await.expect("the test still runs");
        }));
        let client = IdentityClient::new(connect(endpoint.path()).await);
        Self {
            endpoint,
            client,
            stop,
            served,
            _directory: directory,
        }
    }
}

async fn connect(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    // The address is not used: the connector goes to the socket.
    tonic::transport::Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
        .expect("connect")
}

#[tokio::test]
async fn the_plugin_gives_its_name_and_version() {
    let mut plugin = Plugin::start().await;

    let answer = plugin
        .client
        .get_plugin_info(GetPluginInfoRequest {})
        .await
        .expect("call");

    let answer = answer.into_inner();
    assert_eq!(answer.name, "csi.weightd.io");
    assert_eq!(answer.vendor_version, env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn no_controller_is_announced_but_that_nodes_differ() {
    let mut plugin = Plugin::start().await;

    let answer = plugin
        .client
        .get_plugin_capabilities(GetPluginCapabilitiesRequest {})
        .await
        .expect("call");

    let services: Vec<i32> = answer
        .into_inner()
        .capabilities
        .into_iter()
        .filter_map(|capability| match capability.r#type? {
            plugin_capability::Type::Service(service) => Some(service.r#type),
            plugin_capability::Type::VolumeExpansion(_) => None,
        })
        .collect();
    let topology = plugin_capability::service::Type::VolumeAccessibilityConstraints;
    assert_eq!(services, [i32::from(topology)]);
}

#[tokio::test]
async fn the_probe_says_ready_without_a_daemon() {
    let mut plugin = Plugin::start().await;

    let answer = plugin.client.probe(ProbeRequest {}).await.expect("call");

    assert_eq!(answer.into_inner().ready, Some(true));
}

#[tokio::test]
async fn told_to_stop_it_ends_though_a_client_stays_connected() {
    let mut plugin = Plugin::start().await;
    plugin.client.probe(ProbeRequest {}).await.expect("call");

    plugin.stop.send(()).expect("the plugin still runs");
    plugin.served.await.expect("join").expect("serve");

    assert!(
        !plugin.endpoint.path().exists(),
        "the socket is still there"
    );
}

/// HTTP/2 by hand: a Probe whose headers are sent and whose message never comes.
fn call_without_an_end() -> Vec<u8> {
    const HEADERS: u8 = 1;
    const END_HEADERS: u8 = 4;
    // :method POST, :scheme http, then :path, :authority and content-type with their values.
    let mut fields = vec![0x83, 0x86, 0x04, 22];
    fields.extend(b"/csi.v1.Identity/Probe");
    fields.extend([0x01, 1, b'x', 0x0f, 0x10, 16]);
    fields.extend(b"application/grpc");

    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]); // empty SETTINGS
    let length = u8::try_from(fields.len()).expect("a short frame");
    bytes.extend([0, 0, length, HEADERS, END_HEADERS, 0, 0, 0, 1]);
    bytes.extend(fields);
    bytes
}

#[tokio::test(start_paused = true)]
async fn a_call_that_never_ends_holds_up_the_stop_for_the_drain_time_only() {
    let plugin = Plugin::start().await;
    let mut stuck = UnixStream::connect(plugin.endpoint.path())
        .await
        .expect("connect");
    stuck
        .write_all(&call_without_an_end())
        .await
        .expect("write");
    stuck.read_u8().await.expect("the server's settings");
    // Paused time moves only when nothing else can: by then the call is under way.
    tokio::time::sleep(Duration::from_secs(1)).await;

    let told = Instant::now();
    plugin.stop.send(()).expect("the plugin still runs");
    plugin.served.await.expect("join").expect("serve");

    let waited = told.elapsed();
    assert!(
        waited >= weightd_csi::DRAIN,
        "the call was not under way: {waited:?}"
    );
    assert!(waited < weightd_csi::DRAIN * 2, "{waited:?}");
}
