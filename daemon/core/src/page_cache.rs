//! What of a file is in the kernel's page cache, and ways to read it that a loader has. The only place that maps files
//! and asks the kernel about their pages.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::LazyLock;

use memmap2::{Mmap, MmapOptions};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// The most of a file that is mapped at a time: 256 MiB. What is mapped counts towards the memory of a process.
const MAP_BYTES: u64 = 256 << 20;

/// `CAP_FOWNER` among the bits of `CapEff`.
const CAP_FOWNER: u64 = 1 << 3;

static PAGE_BYTES: LazyLock<u64> = LazyLock::new(|| {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    let size = size
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok());
    // Source: every architecture that Linux runs on has pages of at least 4 KiB.
    size.filter(|size| size.is_power_of_two()).unwrap_or(4096)
});

/// Whether the kernel tells this process what of `file` is in the page cache. To others it says "all".
///
/// Source: `can_do_mincore` in Linux since 5.2: the file's owner, or who may act as it.
///
/// # Errors
///
/// What the file system says.
pub fn is_told(file: &File) -> io::Result<bool> {
    let owner = file.metadata()?.uid();
    if owner == nix::unistd::geteuid().as_raw() {
        return Ok(true);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    Ok(effective.is_some_and(|bits| bits & CAP_FOWNER != 0))
}

/// How many of the `length` bytes from `offset` on are in the page cache. Pages count as a whole. Ask [`is_told`] first.
///
/// # Errors
///
/// What the kernel says, for example of a file that cannot be mapped.
pub fn resident(file: &File, offset: u64, length: u64) -> io::Result<u64> {
    let end = file.metadata()?.len().min(offset.saturating_add(length));
    let mut at = offset;
    let mut bytes = 0;
    while at < end {
        let part = MAP_BYTES.min(end - at);
        bytes += resident_part(file, at, part)?;
        at += part;
    }
    Ok(bytes)
}

fn resident_part(file: &File, offset: u64, length: u64) -> io::Result<u64> {
    let page = *PAGE_BYTES;
    let start = offset - offset % page;
    let end = offset + length;
    let map = map(file, start, end - start)?;
    let mut pages = vec![0_u8; usize_of((end - start).div_ceil(page))];
    ask(&map, &mut pages)?;
    // Its lowest bit says it; the others are reserved.
    let here = (0..).zip(&pages).filter(|(_, flags)| *flags & 1 == 1);
    let bytes = here.map(|(number, _): (u64, _)| {
        let page_start = (start + number * page).max(offset);
        (start + (number + 1) * page).min(end) - page_start
    });
    Ok(bytes.sum())
}

#[allow(unsafe_code, reason = "no crate wraps mincore")]
fn ask(map: &Mmap, pages: &mut [u8]) -> io::Result<()> {
    let address = map.as_ptr().cast_mut().cast();
    // SAFETY: the address and length are those of a map that lives through the call, and `pages` has a byte for each
    // page of it. No byte of the file is read, so it does not matter who changes it.
    let code = unsafe { nix::libc::mincore(address, map.len(), pages.as_mut_ptr()) };
    nix::errno::Errno::result(code)
        .map(drop)
        .map_err(io::Error::from)
}

/// Asks the kernel to drop `file` from the page cache. What a process has mapped or locked stays.
///
/// # Errors
///
/// What the kernel says, for example of what is no file.
pub fn drop_cached(file: &File) -> io::Result<()> {
    // Only clean pages can go. Where it cannot be synced, as on a file system mounted read-only, what stays tells.
    let _ = file.sync_data();
    Ok(posix_fadvise(
        file,
        0,
        0,
        PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )?)
}

/// Says that `file` will be read from its beginning to its end, so that the kernel reads further ahead.
pub fn expect_sequential(file: &File) {
    // A hint: without it the read is slower, and as good.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
}

/// Reads the `length` bytes from `offset` on into `buffer`, piece after piece.
///
/// # Errors
///
/// What the file system says, also if the file is shorter.
pub fn read(file: &File, offset: u64, length: u64, buffer: &mut [u8]) -> io::Result<()> {
    let mut at = offset;
    while at < offset + length {
        let piece = usize_of((offset + length - at).min(buffer.len() as u64));
        file.read_exact_at(&mut buffer[..piece], at)?;
        at += piece as u64;
    }
    Ok(())
}

/// Maps the `length` bytes from `offset` on and copies them into `buffer`, piece after piece.
///
/// A file that somebody else makes shorter meanwhile ends the process (SIGBUS), as it does for every loader that maps.
///
/// # Errors
///
/// What the kernel says, also if the file is shorter.
pub fn copy_mapped(file: &File, offset: u64, length: u64, buffer: &mut [u8]) -> io::Result<()> {
    if file.metadata()?.len() < offset.saturating_add(length) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut at = offset;
    while at < offset + length {
        let part = MAP_BYTES.min(offset + length - at);
        let map = map(file, at, part)?;
        for piece in map.chunks(buffer.len()) {
            buffer[..piece.len()].copy_from_slice(piece);
            // Else the compiler may see that nobody reads it, and copy nothing.
            std::hint::black_box(&mut *buffer);
        }
        at += part;
    }
    Ok(())
}

#[allow(
    unsafe_code,
    reason = "a map is what is measured, and what mincore asks about"
)]
fn map(file: &File, offset: u64, length: u64) -> io::Result<Mmap> {
    let mut options = MmapOptions::new();
    options.offset(offset).len(usize_of(length));
    // SAFETY: the map is read-only and stays in this module, which only copies bytes out of it and draws no conclusion
    // from them. Files of a store never change; one that another process shortens ends this one, as is said above.
    unsafe { options.map(file) }
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("parts are far smaller than memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 3 * 65_536 + 777;

    fn file() -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..BYTES).map(|n| (n % 251) as u8).collect();
        std::fs::write(&path, bytes).expect("written");
        (dir, File::open(&path).expect("opened"))
    }

    #[test]
    fn what_was_just_written_is_resident_to_the_byte() {
        let (_dir, file) = file();

        assert!(is_told(&file).expect("metadata"));
        assert_eq!(resident(&file, 0, u64::MAX).expect("asked"), BYTES as u64);
        assert_eq!(resident(&file, 10, 100_000).expect("asked"), 100_000);
        assert_eq!(resident(&file, BYTES as u64 - 5, 70).expect("asked"), 5);
        assert_eq!(resident(&file, BYTES as u64, 70).expect("asked"), 0);
    }

    #[test]
    fn what_is_mapped_by_somebody_is_not_dropped() {
        let (_dir, file) = file();
        let held = map(&file, 0, BYTES as u64).expect("mapped");
        assert_eq!(held[BYTES - 1], ((BYTES - 1) % 251) as u8);
        let sum: u64 = held.iter().map(|byte| u64::from(*byte)).sum();
        assert!(sum > 0);

        drop_cached(&file).expect("asked");

        assert_eq!(resident(&file, 0, u64::MAX).expect("asked"), BYTES as u64);
    }

    #[test]
    fn both_ways_bring_the_bytes_of_the_range_and_no_more() {
        let (_dir, file) = file();
        let expected: Vec<u8> = (1000..4000).map(|n| (n % 251) as u8).collect();
        for bring in [read, copy_mapped] {
            let mut whole = vec![0; 3000];
            bring(&file, 1000, 3000, &mut whole).expect("there");
            assert_eq!(whole, expected);

            // The last piece of 7 lies over the one before.
            let mut pieces = vec![0; 7];
            bring(&file, 1000, 15, &mut pieces).expect("there");
            assert_eq!(pieces[0], expected[14]);

            let error = bring(&file, BYTES as u64 - 1, 2, &mut pieces).expect_err("read on");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
