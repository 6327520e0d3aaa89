//! What S3's refusals mean to a user.

use weightd_core::source::SourceError;

use super::bucket::{Bucket, Question};
use super::client::{Connection, Signer};
use super::failure::{Failure, Kind};

const GIVE_KEYS: &str = "give credentials that may read it: the AWS SDK's own (environment, profile, \
                         `aws sso login`, IRSA, Pod Identity), or the keys in the volume's secret";

/// What `failure`, the answer to `question`, means to the user.
pub(super) fn refusal(
    bucket: &Bucket,
    connection: &Connection,
    question: &Question,
    failure: Failure,
) -> SourceError {
    let what = question.what.clone();
    let (host, retry_after) = (connection.host(), failure.retry_after);
    let unavailable = |detail: String| SourceError::Unavailable {
        what: what.clone(),
        detail,
        retry_after,
    };
    match failure.kind {
        Kind::Answer {
            status,
            code,
            message,
        } => {
            let answer = Answer {
                status,
                code,
                message,
            };
            if answer.is_passing() {
                return unavailable(answer.said(&host));
            }
            refused(bucket, connection, question, &answer)
        }
        Kind::NoAnswer(reason) => unavailable(format!("{host}: {reason}")),
        Kind::NoCredentials {
            reason,
            passing: true,
        } => unavailable(format!("AWS credentials could not be had: {reason}")),
        Kind::NoCredentials { reason, .. } => SourceError::Denied {
            what,
            detail: format!("AWS credentials could not be had: {reason}"),
            hint: Some(
                "check the profile or the role and its trust policy; `aws sts get-caller-identity` \
                 tests them"
                    .to_owned(),
            ),
        },
        Kind::NothingFound => SourceError::Denied {
            what,
            detail: "no AWS credentials were found".to_owned(),
            hint: Some(GIVE_KEYS.to_owned()),
        },
        Kind::NotSent(reason) => SourceError::Invalid {
            what,
            detail: reason,
            hint: None,
        },
    }
}

struct Answer {
    status: u16,
    code: String,
    message: String,
}

impl Answer {
    /// May the same request succeed a little later?
    ///
    /// Source: the Amazon S3 API reference, "Error responses".
    fn is_passing(&self) -> bool {
        let passing = [
            "SlowDown",
            "InternalError",
            "ServiceUnavailable",
            "RequestTimeout",
        ];
        let status = matches!(self.status, 408 | 425 | 429 | 500 | 502 | 503 | 504);
        status || passing.contains(&self.code.as_str())
    }

    /// `host answered 403 AccessDenied: message`.
    fn said(&self, host: &str) -> String {
        let mut text = format!("{host} answered {}", self.status);
        if !self.code.is_empty() {
            text.push(' ');
            text.push_str(&self.code);
        }
        if !self.message.is_empty() {
            text.push_str(": ");
            text.push_str(&self.message);
        }
        text
    }
}

/// Source: the Amazon S3 API reference, "Error responses", for the codes.
fn refused(
    bucket: &Bucket,
    connection: &Connection,
    question: &Question,
    answer: &Answer,
) -> SourceError {
    let said = answer.said(&connection.host());
    let what = question.what.clone();
    let denied = |detail: String, hint: &str| SourceError::Denied {
        what: what.clone(),
        detail,
        hint: Some(hint.to_owned()),
    };
    let invalid = |detail: String, hint: Option<String>| SourceError::Invalid {
        what: what.clone(),
        detail,
        hint,
    };
    match (answer.status, answer.code.as_str()) {
        (_, "NoSuchBucket") => SourceError::NotFound {
            what: format!("bucket {}", bucket.name),
            detail: said,
            hint: Some(
                "check the bucket's name, and AWS_ENDPOINT_URL_S3 if it is not at AWS".into(),
            ),
        },
        (_, "InvalidAccessKeyId") => denied(
            format!("{} does not know the access key", connection.host()),
            "check the access key, and that it belongs to this endpoint",
        ),
        (_, "SignatureDoesNotMatch") => denied(
            format!("{} does not accept the signature", connection.host()),
            "check the secret key: it does not belong to the access key",
        ),
        (_, "ExpiredToken" | "TokenRefreshRequired" | "InvalidToken") => denied(
            format!("the credentials have expired or are not valid ({said})"),
            "renew them, for example with `aws sso login`",
        ),
        (_, "RequestTimeTooSkewed") => denied(said, "set this machine's clock"),
        (_, "InvalidObjectState") => archived(what, &said),
        (412, _) => SourceError::Changed {
            what,
            detail: "it has another ETag than when it was listed".to_owned(),
        },
        (404 | 416, _) if question.listed => SourceError::Changed { what, detail: said },
        (404, _) => SourceError::NotFound {
            what,
            detail: said,
            hint: None,
        },
        (401 | 403, _) => no_access(bucket, connection, question, said),
        (301 | 307 | 308, _)
        | (_, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => invalid(
            format!(
                "the bucket is in another region than {} ({said})",
                connection.region
            ),
            Some("set AWS_REGION to the bucket's region".to_owned()),
        ),
        _ => invalid(said, None),
    }
}

/// An object that must be brought back from the archive first.
pub(super) fn archived(what: String, detail: &str) -> SourceError {
    SourceError::Invalid {
        what,
        detail: format!("it is archived: {detail}"),
        hint: Some(
            "restore it first (`aws s3api restore-object`), or copy it to another storage class"
                .to_owned(),
        ),
    }
}

fn no_access(
    bucket: &Bucket,
    connection: &Connection,
    question: &Question,
    said: String,
) -> SourceError {
    let permission = question.permission;
    let resource = match permission {
        "s3:ListBucket" => format!("arn:aws:s3:::{}", bucket.name),
        _ => format!("arn:aws:s3:::{}/{}*", bucket.name, bucket.prefix),
    };
    let (who, hint) = match connection.signer {
        Signer::Nobody => (
            "unsigned requests",
            "the bucket is not public: give credentials, and do not ask for unsigned requests"
                .into(),
        ),
        Signer::NothingFound => (
            "unsigned requests, for no AWS credentials were found",
            format!("the bucket is not public: {GIVE_KEYS}"),
        ),
        Signer::Keys => (
            "the keys that came with the request",
            allow(permission, &resource),
        ),
        Signer::Chain => (
            "the AWS SDK's default credentials (`aws sts get-caller-identity` names them)",
            allow(permission, &resource),
        ),
    };
    SourceError::Denied {
        what: question.what.clone(),
        detail: format!("{permission} is not allowed to {who} ({said})"),
        hint: Some(hint),
    }
}

fn allow(permission: &str, resource: &str) -> String {
    format!(
        "allow {permission} on {resource} (and kms:Decrypt on the key of encrypted objects); a bucket \
         whose requester pays cannot be read"
    )
}
