//! Bytes from a server to nowhere: what the origin and the sockets alone allow.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

/// What one read of a socket may bring.
const BUFFER_BYTES: usize = 256 << 10;

/// One range of what lies at an address.
struct Part {
    host: String,
    path: String,
    first: u64,
    last: u64,
}

/// A connection that stays open from one request to the next.
struct Connection {
    host: String,
    socket: BufReader<TcpStream>,
}

impl Connection {
    fn open(host: &str) -> Result<Self> {
        let socket = TcpStream::connect(host).with_context(|| format!("cannot reach {host}"))?;
        socket.set_nodelay(true)?;
        Ok(Self {
            host: host.to_owned(),
            socket: BufReader::with_capacity(BUFFER_BYTES, socket),
        })
    }

    /// Sends a request and returns the length of the body that follows.
    fn ask(&mut self, method: &str, path: &str, range: Option<(u64, u64)>) -> Result<u64> {
        let range = range.map_or_else(String::new, |(first, last)| {
            format!("Range: bytes={first}-{last}\r\n")
        });
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{range}\r\n",
            self.host
        );
        self.socket.get_mut().write_all(request.as_bytes())?;
        let (mut line, mut length) = (String::new(), None);
        self.socket.read_line(&mut line)?;
        ensure!(
            line.starts_with("HTTP/1.1 20"),
            "{} answers `{}` for {path}",
            self.host,
            line.trim()
        );
        loop {
            line.clear();
            ensure!(
                self.socket.read_line(&mut line)? > 0,
                "{} hung up",
                self.host
            );
            match line.trim().split_once(':') {
                None => break,
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = Some(value.trim().parse()?);
                }
                Some(_) => {}
            }
        }
        length.with_context(|| format!("{} names no length for {path}", self.host))
    }

    fn drop_body(&mut self, length: u64, buffer: &mut [u8]) -> Result<()> {
        let mut left = length as usize;
        while left > 0 {
            let most = left.min(buffer.len());
            let got = self.socket.read(&mut buffer[..most])?;
            ensure!(got > 0, "{} hung up", self.host);
            left -= got;
        }
        Ok(())
    }
}

/// Reads all of `urls` in ranges of `part` bytes over `connections`.
pub(crate) fn measure(urls: &[String], connections: usize, part: u64) -> Result<Value> {
    let parts = Mutex::new(split(urls, part)?);
    let begun = Instant::now();
    let bytes = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..connections.max(1))
            .map(|_| scope.spawn(|| read(&parts)))
            .collect();
        let read = readers
            .into_iter()
            .map(|reader| reader.join().expect("it does not panic"));
        read.sum::<Result<u64>>()
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(json!({
        "connections": connections,
        "bytes": bytes,
        "seconds": seconds,
        "gigabytes_per_second": bytes as f64 / 1e9 / seconds,
    }))
}

/// The parts in reverse, to be taken from the end.
fn split(urls: &[String], part: u64) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    for url in urls {
        let rest = url.strip_prefix("http://").context("only http://")?;
        let (host, path) = rest.split_at(rest.find('/').context("no path in the address")?);
        let size = Connection::open(host)?.ask("HEAD", path, None)?;
        for first in (0..size).step_by(part.max(1) as usize) {
            parts.push(Part {
                host: host.to_owned(),
                path: path.to_owned(),
                first,
                last: (first + part).min(size) - 1,
            });
        }
    }
    parts.reverse();
    Ok(parts)
}

/// Reads parts until none is left; returns how many bytes they had.
fn read(parts: &Mutex<Vec<Part>>) -> Result<u64> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut connection: Option<Connection> = None;
    let mut bytes = 0;
    loop {
        let next = parts
            .lock()
            .map_err(|_| anyhow!("a reader panicked"))?
            .pop();
        let Some(part) = next else { return Ok(bytes) };
        let mut open = match connection.take().filter(|open| open.host == part.host) {
            Some(open) => open,
            None => Connection::open(&part.host)?,
        };
        let length = open.ask("GET", &part.path, Some((part.first, part.last)))?;
        open.drop_body(length, &mut buffer)?;
        bytes += length;
        connection = Some(open);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Answers HEAD with a size and GET with the range that was asked for; returns its address.
    fn serve(size: u64) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                std::thread::spawn(move || answer(BufReader::new(socket.unwrap()), size));
            }
        });
        format!("http://{address}/object")
    }

    fn answer(mut socket: BufReader<TcpStream>, size: u64) {
        loop {
            let mut request = String::new();
            while !request.ends_with("\r\n\r\n") {
                if socket.read_line(&mut request).unwrap() == 0 {
                    return;
                }
            }
            let range = request.split("bytes=").nth(1);
            let length = range.map_or(size, |range| {
                let (first, last) = range.lines().next().unwrap().split_once('-').unwrap();
                last.parse::<u64>().unwrap() - first.parse::<u64>().unwrap() + 1
            });
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
            socket.get_mut().write_all(head.as_bytes()).unwrap();
            if range.is_some() {
                let body = vec![0; length as usize];
                socket.get_mut().write_all(&body).unwrap();
            }
        }
    }

    #[test]
    fn every_byte_of_every_address_is_read() {
        let urls = [serve(1_000_001), serve(1), serve(0)];

        let result = measure(&urls, 4, 65_536).unwrap();

        assert_eq!(result["bytes"], 1_000_002);
    }
}
