//! Labels by which a scheduler prefers nodes that have a model.

use weightd_core::model::ModelRef;

/// The longest name that a label may have after its prefix: 63.
///
/// Source: Kubernetes, "Labels and Selectors", syntax and character set.
const NAME_MAX: usize = 63;

/// The label of a node that has `model`, at some revision: `model.weightd.io/hf.org.model`. `None` if the model's
/// name cannot be a label's: then there is no preference.
///
/// An admission policy computes the same in CEL, which knows no hash: so names are not shortened.
#[must_use]
pub fn label_key(model: &ModelRef) -> Option<String> {
    let name = format!("{}.{}", model.scheme().as_str(), model.name()).replace('/', ".");
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let ends_well = name.bytes().last()?.is_ascii_alphanumeric();
    (name.len() <= NAME_MAX && ends_well && name.bytes().all(allowed))
        .then(|| format!("model.weightd.io/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(model: &str) -> Option<String> {
        label_key(&model.parse().expect("model"))
    }

    #[test]
    fn a_model_has_one_label_whatever_its_revision() {
        let label = Some("model.weightd.io/hf.org.model-1.5_b".to_owned());

        assert_eq!(key("hf://org/model-1.5_b"), label);
        assert_eq!(key("hf://org/model-1.5_b@v2"), label);
        assert_eq!(
            key("s3://bucket/models/x").as_deref(),
            Some("model.weightd.io/s3.bucket.models.x")
        );
    }

    #[test]
    fn a_name_that_no_label_can_have_has_none() {
        assert_eq!(key("s3://bucket/a b"), None);
        assert_eq!(key("s3://bucket/model_"), None);
        assert_eq!(key(&format!("s3://bucket/{}", "x".repeat(60))), None);
    }
}
