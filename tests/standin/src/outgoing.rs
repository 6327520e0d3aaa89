//! The body that reaches the socket: counted, and spoilt by the faults that hit it.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::{Body as _, Frame, SizeHint};
use tokio::time::Sleep;

use crate::content::Body;
use crate::fault::FaultKind;
use crate::log::{Entry, InFlight};

/// What lets hyper flush the bytes before a cut; dropped with the connection otherwise.
const FLUSH_PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Stall,
    Cut,
    Short,
}

/// What happens to one body. Positions are those of the body, not of the file.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    end: Option<(u64, End)>,
    flips: Vec<(u64, u8)>,
    bytes_per_second: Option<u64>,
    padding: u64,
}

impl Plan {
    /// `start` is the offset in the file of the body's first byte, `length` the body's.
    pub(crate) fn new(kinds: &[FaultKind], start: u64, length: u64) -> Self {
        let mut plan = Self::default();
        for kind in kinds {
            match *kind {
                FaultKind::Stall { after_bytes } => plan.end_at(after_bytes, End::Stall),
                FaultKind::Cut { after_bytes } => plan.end_at(after_bytes, End::Cut),
                FaultKind::Slow { bytes_per_second } => {
                    plan.bytes_per_second = Some(bytes_per_second.max(1));
                }
                FaultKind::Corrupt { at_byte, xor } => {
                    plan.flips.push((at_byte.saturating_sub(start), xor));
                }
                FaultKind::WrongLength { by } if by < 0 => {
                    plan.end_at(length.saturating_sub(by.unsigned_abs()), End::Short);
                }
                FaultKind::WrongLength { by } => plan.padding = by.unsigned_abs(),
                _ => {}
            }
        }
        plan
    }

    fn end_at(&mut self, position: u64, end: End) {
        if self.end.is_none_or(|(earlier, _)| position < earlier) {
            self.end = Some((position, end));
        }
    }

    /// The body's length on the wire, for `Content-Length`.
    pub(crate) fn length(&self, length: u64) -> u64 {
        match self.end {
            Some((position, End::Short)) => position,
            _ => length + self.padding,
        }
    }
}

/// A body on its way out.
pub(crate) struct Outgoing {
    inner: Body,
    plan: Plan,
    position: u64,
    /// Read from `inner`, not yet sent.
    held: Bytes,
    pause: Option<Pin<Box<Sleep>>>,
    flushed: bool,
    entry: Option<Arc<Entry>>,
    _in_flight: Option<InFlight>,
}

impl Outgoing {
    pub(crate) fn new(inner: Body, plan: Plan, entry: Arc<Entry>, in_flight: InFlight) -> Self {
        Self {
            entry: Some(entry),
            _in_flight: Some(in_flight),
            ..Self::unwatched(inner, plan)
        }
    }

    pub(crate) fn plain(inner: Body) -> Self {
        Self::unwatched(inner, Plan::default())
    }

    fn unwatched(inner: Body, plan: Plan) -> Self {
        Self {
            inner,
            plan,
            position: 0,
            held: Bytes::new(),
            pause: None,
            flushed: false,
            entry: None,
            _in_flight: None,
        }
    }

    /// The next bytes of the inner body, then the padding.
    fn poll_bytes(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if !self.held.is_empty() {
            return Poll::Ready(Some(Ok(std::mem::take(&mut self.held))));
        }
        loop {
            match ready!(Pin::new(&mut self.inner).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) if !bytes.is_empty() => return Poll::Ready(Some(Ok(bytes))),
                    _ => {}
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None if self.plan.padding > 0 => {
                    let padding = BytesMut::zeroed(self.plan.padding as usize);
                    self.plan.padding = 0;
                    return Poll::Ready(Some(Ok(padding.freeze())));
                }
                None => return Poll::Ready(None),
            }
        }
    }

    /// How many bytes may go out in one piece.
    fn allowance(&self) -> u64 {
        let to_end = self
            .plan
            .end
            .map_or(u64::MAX, |(end, _)| end - self.position);
        // A twentieth of a second's worth, so that a slow body trickles instead of coming in gulps.
        let to_pause = self
            .plan
            .bytes_per_second
            .map_or(u64::MAX, |rate| (rate / 20).max(1));
        to_end.min(to_pause)
    }

    fn spoil(&self, chunk: Bytes) -> Bytes {
        let here = self.position..self.position + chunk.len() as u64;
        if !self.plan.flips.iter().any(|(at, _)| here.contains(at)) {
            return chunk;
        }
        let mut changed = BytesMut::from(&chunk[..]);
        for (at, xor) in &self.plan.flips {
            if here.contains(at) {
                changed[(at - self.position) as usize] ^= xor;
            }
        }
        changed.freeze()
    }
}

impl hyper::body::Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        if let Some(pause) = &mut this.pause {
            ready!(pause.as_mut().poll(context));
            this.pause = None;
        }
        if let Some((end, how)) = this.plan.end
            && this.position >= end
        {
            match how {
                End::Short => return Poll::Ready(None),
                End::Stall => return Poll::Pending,
                End::Cut if this.flushed => {
                    return Poll::Ready(Some(Err(io::ErrorKind::ConnectionReset.into())));
                }
                End::Cut => {
                    this.flushed = true;
                    let mut pause = Box::pin(tokio::time::sleep(FLUSH_PAUSE));
                    let _ = pause.as_mut().poll(context);
                    this.pause = Some(pause);
                    return Poll::Pending;
                }
            }
        }
        let mut chunk = match ready!(this.poll_bytes(context)) {
            Some(Ok(chunk)) => chunk,
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => return Poll::Ready(None),
        };
        let allowance = this.allowance();
        if chunk.len() as u64 > allowance {
            this.held = chunk.split_off(allowance as usize);
        }
        let chunk = this.spoil(chunk);
        this.position += chunk.len() as u64;
        if let Some(entry) = &this.entry {
            entry.update(|request| request.bytes_sent += chunk.len() as u64);
        }
        if let Some(rate) = this.plan.bytes_per_second {
            let pause = Duration::from_secs_f64(chunk.len() as f64 / rate as f64);
            this.pause = Some(Box::pin(tokio::time::sleep(pause)));
        }
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.plan.end.is_none()
            && self.plan.padding == 0
            && self.held.is_empty()
            && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
