//! A bare HTTP/1.1 client: no redirects, no retries, and a cut body is an answer too.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub(crate) struct Ask {
    method: String,
    url: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    patience: Duration,
}

#[derive(Debug)]
pub(crate) struct Answer {
    /// 0 if none came.
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
    /// Whether the server closed the connection.
    pub(crate) closed: bool,
}

pub(crate) fn ask(method: &str, url: &str) -> Ask {
    Ask {
        method: method.to_owned(),
        url: url.to_owned(),
        headers: Vec::new(),
        body: Vec::new(),
        patience: Duration::from_secs(10),
    }
}

pub(crate) async fn get(url: &str) -> Answer {
    ask("GET", url).send().await
}

pub(crate) async fn head(url: &str) -> Answer {
    ask("HEAD", url).send().await
}

/// GET of the bytes from `first` to `last`.
pub(crate) async fn get_range(url: &str, first: u64, last: u64) -> Answer {
    let range = format!("bytes={first}-{last}");
    ask("GET", url).header("Range", &range).send().await
}

impl Ask {
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn token(self, token: &str) -> Self {
        self.header("Authorization", &format!("Bearer {token}"))
    }

    pub(crate) fn body(mut self, kind: &str, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self.header("Content-Type", kind)
    }

    pub(crate) fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    pub(crate) async fn send(self) -> Answer {
        let rest = self.url.strip_prefix("http://").expect("an http URL");
        let (address, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let mut request = format!(
            "{} {} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n",
            self.method,
            if path.is_empty() { "/" } else { path },
            self.body.len()
        );
        for (name, value) in &self.headers {
            request += &format!("{name}: {value}\r\n");
        }
        request += "\r\n";
        let mut stream = TcpStream::connect(address).await.expect("connect");
        stream.write_all(request.as_bytes()).await.expect("write");
        stream.write_all(&self.body).await.expect("write");
        let mut received = Vec::new();
        let reading = stream.read_to_end(&mut received);
        let closed = tokio::time::timeout(self.patience, reading).await.is_ok();
        Answer::parse(&received, closed)
    }
}

impl Answer {
    fn parse(received: &[u8], closed: bool) -> Self {
        let end = received.windows(4).position(|four| four == b"\r\n\r\n");
        let (head, body) = match end {
            Some(end) => (&received[..end], received[end + 4..].to_vec()),
            None => (received, Vec::new()),
        };
        let head = String::from_utf8_lossy(head);
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1));
        Self {
            status: status.map_or(0, |status| status.parse().expect("a status")),
            headers: lines
                .filter_map(|line| line.split_once(": "))
                .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
                .collect(),
            body,
            closed,
        }
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Whether the body is as long as its `Content-Length` says.
    pub(crate) fn is_whole(&self) -> bool {
        self.closed && self.header("content-length") == self.body.len().to_string()
    }
}
