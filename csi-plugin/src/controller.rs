//! The Controller service, which there is not: a model needs no disk to be made or attached.

use tonic::{Request, Response, Status};
use weightd_proto::csi::v1 as csi;

/// Answers every call with `UNIMPLEMENTED`.
#[derive(Debug, Clone, Copy)]
pub struct NoController;

fn no<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented(
        "csi.weightd.io has no controller: models are mounted on the node",
    ))
}

#[tonic::async_trait]
impl csi::controller_server::Controller for NoController {
    async fn create_volume(
        &self,
        _: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        no()
    }

    async fn delete_volume(
        &self,
        _: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        no()
    }

    async fn controller_publish_volume(
        &self,
        _: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        no()
    }

    async fn controller_unpublish_volume(
        &self,
        _: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        no()
    }

    async fn validate_volume_capabilities(
        &self,
        _: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        no()
    }

    async fn list_volumes(
        &self,
        _: Request<csi::ListVolumesRequest>,
    ) -> Result<Response<csi::ListVolumesResponse>, Status> {
        no()
    }

    async fn get_capacity(
        &self,
        _: Request<csi::GetCapacityRequest>,
    ) -> Result<Response<csi::GetCapacityResponse>, Status> {
        no()
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        no()
    }
}
