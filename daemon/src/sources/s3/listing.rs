//! What a prefix holds.

use std::collections::HashSet;

use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use weightd_core::model::Revision;
use weightd_core::source::SourceError;

use super::bucket::{Bucket, Question};

/// More objects than any model has: somebody named a whole bucket by mistake.
const MOST_OBJECTS: usize = 500_000;

/// A page may hold few objects, or none, but not so few that this is reached.
const PAGES: usize = 100_000;

/// One object as it is listed.
#[derive(Debug, Clone)]
pub(super) struct Listed {
    /// The key without the prefix.
    pub(super) path: String,
    pub(super) size: u64,
    /// Without quotes.
    pub(super) etag: String,
}

/// All objects of the prefix, and the digest that stands for them.
#[derive(Debug)]
pub(super) struct Objects {
    pub(super) revision: Revision,
    pub(super) all: Vec<Listed>,
}

/// An ETag without its quotes.
pub(super) fn bare_etag(etag: Option<&str>) -> String {
    etag.unwrap_or_default().trim_matches('"').to_owned()
}

/// Lists the whole prefix.
pub(super) async fn list(bucket: &Bucket) -> Result<Objects, SourceError> {
    let mut all = Vec::new();
    let mut next: Option<String> = None;
    let mut seen = HashSet::new();
    loop {
        let page = page(bucket, &bucket.prefix, None, next.as_deref()).await?;
        for object in page.contents() {
            let key = object.key().unwrap_or_default();
            let size = object.size().and_then(|size| u64::try_from(size).ok());
            let (Some(path), Some(size)) = (key.strip_prefix(&bucket.prefix), size) else {
                return Err(nonsense(
                    bucket,
                    "an object outside of the prefix, or without a size",
                ));
            };
            // Consoles mark a folder with an empty object.
            if size == 0 && (path.is_empty() || path.ends_with('/')) {
                continue;
            }
            all.push(Listed {
                path: path.to_owned(),
                size,
                etag: bare_etag(object.e_tag()),
            });
        }
        if all.len() > MOST_OBJECTS {
            return Err(SourceError::Invalid {
                what: bucket.model.to_string(),
                detail: format!("it holds more than {MOST_OBJECTS} objects"),
                hint: Some("name the prefix of one model".to_owned()),
            });
        }
        if page.is_truncated() != Some(true) {
            break;
        }
        next = page.next_continuation_token().map(str::to_owned);
        let goes_on = next.clone().is_some_and(|token| seen.insert(token));
        if !goes_on || seen.len() == PAGES {
            return Err(nonsense(
                bucket,
                "a listing that does not go on, or never ends",
            ));
        }
    }
    if all.is_empty() {
        return Err(nothing(bucket).await);
    }
    let line = |object: &Listed| format!("{}\0{}\0{}", object.path, object.size, object.etag);
    Ok(Objects {
        revision: Revision::of_listing(all.iter().map(line)),
        all,
    })
}

async fn page(
    bucket: &Bucket,
    prefix: &str,
    delimiter: Option<&str>,
    next: Option<&str>,
) -> Result<ListObjectsV2Output, SourceError> {
    let question = Question {
        permission: "s3:ListBucket",
        what: bucket.model.to_string(),
        listed: false,
    };
    bucket
        .ask(&question, async |connection| {
            let request = connection.questions.list_objects_v2().bucket(&bucket.name);
            let request = request
                .set_prefix((!prefix.is_empty()).then(|| prefix.to_owned()))
                .set_delimiter(delimiter.map(str::to_owned))
                .set_continuation_token(next.map(str::to_owned));
            request.send().await
        })
        .await
}

fn nonsense(bucket: &Bucket, sent: &str) -> SourceError {
    SourceError::Invalid {
        what: bucket.model.to_string(),
        detail: format!("the server sent {sent}"),
        hint: None,
    }
}

/// Why there is nothing, as far as a second look tells.
async fn nothing(bucket: &Bucket) -> SourceError {
    let not_found = |detail: String, hint: String| SourceError::NotFound {
        what: bucket.model.to_string(),
        detail,
        hint: Some(hint),
    };
    let Some(key) = bucket.prefix.strip_suffix('/') else {
        return not_found(
            format!("the bucket `{}` is empty", bucket.name),
            "upload the model first, or check the bucket's name".to_owned(),
        );
    };
    let detail = format!("the bucket `{}` holds nothing under `{key}/`", bucket.name);
    let check = || "check the prefix: upper and lower case differ".to_owned();
    let Ok(near) = page(bucket, key, Some("/"), None).await else {
        return not_found(detail, check());
    };
    if near
        .contents()
        .iter()
        .any(|object| object.key() == Some(key))
    {
        let folder = key.rsplit_once('/').map_or("", |(folder, _)| folder);
        let address = bucket.address(folder);
        return not_found(
            format!("`{key}` is one object, not a prefix"),
            format!(
                "name the prefix that it lies under: {}",
                address.trim_end_matches('/')
            ),
        );
    }
    let prefixes = near.common_prefixes().iter();
    let near: Vec<_> = prefixes.filter_map(|near| near.prefix()).take(3).collect();
    if near.is_empty() {
        return not_found(detail, check());
    }
    let near = near
        .iter()
        .map(|near| bucket.address(near.trim_end_matches('/')));
    let near = near.collect::<Vec<_>>().join(", ");
    not_found(detail, format!("there is {near}"))
}
