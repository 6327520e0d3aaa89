//! Who the plugin is. No answer here waits for a disk, the daemon or the network: the liveness probe allows 1 s.

use tonic::{Request, Response, Status};
use weightd_proto::csi::v1::identity_server;
use weightd_proto::csi::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, PluginCapability, ProbeRequest, ProbeResponse, plugin_capability,
};

/// The driver's name. It equals the name of the CSIDriver object and is part of every volume's address.
pub const DRIVER: &str = "csi.weightd.io";

/// The Identity service.
#[derive(Debug, Clone, Copy)]
pub struct Identity;

#[tonic::async_trait]
impl identity_server::Identity for Identity {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        // There is no controller. NodeGetInfo reports a topology, which this capability announces.
        let service = plugin_capability::Service {
            r#type: plugin_capability::service::Type::VolumeAccessibilityConstraints.into(),
        };
        let topology = PluginCapability {
            r#type: Some(plugin_capability::Type::Service(service)),
        };
        Ok(Response::new(GetPluginCapabilitiesResponse {
            capabilities: vec![topology],
        }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        // A plugin that answers is ready. Whether the daemon is, each volume's own call says; killing the plugin
        // because the daemon restarts would mend nothing.
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}
