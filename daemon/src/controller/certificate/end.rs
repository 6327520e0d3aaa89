//! When a certificate ends: the one thing that is read of it, and so without a parser for all the rest.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

const SEQUENCE: u8 = 0x30;
/// `[0]`, before the version.
const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// `notAfter` of a certificate in DER; `None` if it is none.
///
/// Source: RFC 5280, section 4.1.
pub(super) fn end(certificate: &[u8]) -> Option<Timestamp> {
    let (signed, _) = element(certificate, SEQUENCE)?;
    let (mut rest, _) = element(signed, SEQUENCE)?;
    if rest.first() == Some(&VERSION) {
        rest = any(rest)?.2;
    }
    // Serial number, signature algorithm, issuer.
    for _ in 0..3 {
        rest = any(rest)?.2;
    }
    let (validity, _) = element(rest, SEQUENCE)?;
    let (tag, text, _) = any(any(validity)?.2)?;
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let text = match tag {
        GENERALIZED_TIME => text.to_owned(),
        // Source: RFC 5280, section 4.1.2.5.1: from 50 on the year is of the last century.
        UTC_TIME if text.get(..2)? < "50" => format!("20{text}"),
        UTC_TIME => format!("19{text}"),
        _ => return None,
    };
    let time = DateTime::strptime("%Y%m%d%H%M%S", &text).ok()?;
    let time = time.to_zoned(TimeZone::UTC).ok()?;
    Some(time.timestamp())
}

/// The content of the element that `bytes` begin with, if it is a `tag`, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, content, rest) = any(bytes)?;
    (found == tag).then_some((content, rest))
}

/// The tag and the content of the element that `bytes` begin with, and what follows it.
fn any(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, bytes) = bytes.split_first()?;
    let (&first, mut bytes) = bytes.split_first()?;
    let mut length = usize::from(first);
    if first >= 0x80 {
        let (long, rest) = bytes.split_at_checked(usize::from(first & 0x7f))?;
        if long.len() > 4 {
            return None;
        }
        length = long
            .iter()
            .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        bytes = rest;
    }
    let (content, rest) = bytes.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};
    use rustls::pki_types::CertificateDer;

    use super::*;

    fn certificate(year: i32) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(["a.weightd.svc".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 3, 1);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().into()
    }

    #[test]
    fn both_kinds_of_time_are_read() {
        // From 2050 on another kind is used.
        for year in [2031, 2049, 2050, 2199] {
            let expected: Timestamp = format!("{year}-03-01T00:00:00Z").parse().unwrap();
            assert_eq!(end(&certificate(year)), Some(expected), "{year}");
        }
    }

    #[test]
    fn what_is_cut_off_or_no_certificate_has_no_end() {
        let whole = certificate(2031);
        for length in 0..whole.len() {
            assert_eq!(end(&whole[..length]), None, "{length}");
        }
        for bytes in [
            &b"x"[..],
            &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff],
            &[0x30, 0xff],
        ] {
            assert_eq!(end(bytes), None, "{bytes:?}");
        }
    }
}
