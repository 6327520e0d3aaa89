//! The CRD of the chart is that of the code.
//!
//! `UPDATE=1 cargo test -p weightd --test crd` writes it anew.

use std::path::Path;

use kube::CustomResourceExt;
use weightd::kube::prefetch::ModelPrefetch;

#[test]
fn the_crd_of_the_chart_is_that_of_the_code() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/chart/crds/modelprefetch.yaml");
    let body = serde_saphyr::to_string(&ModelPrefetch::crd()).expect("a CRD is YAML");
    let expected =
        format!("# Made by `UPDATE=1 cargo test -p weightd --test crd`: not to be edited.\n{body}");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &expected).expect("modelprefetch.yaml");
        return;
    }
    let text = std::fs::read_to_string(&path).expect("modelprefetch.yaml");
    assert!(
        text == expected,
        "run `UPDATE=1 cargo test -p weightd --test crd` and look at what changed"
    );
}
