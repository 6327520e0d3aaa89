//! The body of an answer, as a stream that ends where it should.

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use reqwest::Response;
use weightd_core::source::{ByteStream, SourceError};

use super::refusal::cause;

struct Rest {
    chunks: BoxStream<'static, reqwest::Result<Bytes>>,
    bytes: u64,
    what: String,
    host: String,
}

/// The first `bytes` bytes of the body. Fewer are an error, more are not read.
pub(super) fn body(response: Response, bytes: u64, what: String, host: String) -> ByteStream {
    let rest = Rest {
        chunks: response.bytes_stream().boxed(),
        bytes,
        what,
        host,
    };
    // After an error there is no state, and the stream ends.
    stream::unfold(Some(rest), |rest| async {
        let mut rest = rest.filter(|rest| rest.bytes > 0)?;
        let detail = match rest.chunks.next().await {
            Some(Ok(mut chunk)) => {
                let wanted = usize::try_from(rest.bytes).unwrap_or(usize::MAX);
                chunk.truncate(wanted);
                rest.bytes -= chunk.len() as u64;
                return Some((Ok(chunk), Some(rest)));
            }
            Some(Err(error)) => format!("{}: {}", rest.host, cause(error)),
            None => format!("{} ended {} bytes early", rest.host, rest.bytes),
        };
        let error = SourceError::Unavailable {
            what: rest.what,
            detail,
            retry_after: None,
        };
        Some((Err(error), None))
    })
    .boxed()
}
