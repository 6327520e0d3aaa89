//! Which bytes of a `.part` are on disk: fixed-size records, appended as blocks are written.
//!
//! A record carries the checksum of its bytes, so that after a power loss, when the journal may be
//! ahead of the bytes, a block that never reached the disk is found out and fetched again.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use twox_hash::XxHash3_64;

use crate::fault;

/// Bytes of one record: offset, length, checksum of the bytes, checksum of the record; little endian.
const RECORD: usize = 32;

/// No block is longer, so that each can be checked in memory: 64 MiB.
const LONGEST: u64 = 64 << 20;

/// One block that is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) range: Range<u64>,
    pub(super) checksum: u64,
}

impl Record {
    fn encode(&self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[..8].copy_from_slice(&self.range.start.to_le_bytes());
        bytes[8..16].copy_from_slice(&(self.range.end - self.range.start).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.checksum.to_le_bytes());
        let check = checksum(&bytes[..24]);
        bytes[24..].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| {
            bytes
                .get(at..at + 8)
                .map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")))
        };
        let (start, length, sum, check) = (number(0)?, number(8)?, number(16)?, number(24)?);
        let end = start.checked_add(length).filter(|_| length <= LONGEST)?;
        (check == checksum(&bytes[..24])).then_some(Self {
            range: start..end,
            checksum: sum,
        })
    }
}

/// XXH3-64 of the bytes: a third of the time that a CRC takes.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// The journal beside a `.part`.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    /// Made with its first record: a file that comes in one piece has none.
    file: Option<File>,
}

impl Journal {
    pub(super) fn path_of(part: &Path) -> PathBuf {
        part.with_extension("journal")
    }

    /// Opens the journal and reads the records of a file of `size` bytes. Torn and overlapping records
    /// are left out.
    pub(super) fn open(path: PathBuf, size: u64) -> io::Result<(Self, Vec<Record>)> {
        let mut file = match existing(&path)? {
            Some(file) => file,
            None => return Ok((Self { path, file: None }, Vec::new())),
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let mut records: Vec<Record> = bytes.chunks(RECORD).filter_map(Record::decode).collect();
        records.retain(|record| !record.range.is_empty() && record.range.end <= size);
        records.sort_by_key(|record| record.range.start);
        records.dedup_by(|next, kept| next.range.start < kept.range.end);
        // A torn record at the end would shift all that follow it.
        if bytes.len() % RECORD != 0 {
            file.set_len((bytes.len() - bytes.len() % RECORD) as u64)?;
        }
        let file = Some(file);
        Ok((Self { path, file }, records))
    }

    pub(super) fn append(&mut self, record: &Record) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(open_to_append(&self.path, true)?),
        };
        file.write_all(&record.encode())
    }

    /// Starts over with just these records.
    pub(super) fn rewrite(&mut self, records: &[Record]) -> io::Result<()> {
        let bytes: Vec<u8> = records.iter().flat_map(Record::encode).collect();
        // Beside the old one: whoever dies on the way, or has no room, leaves that whole.
        let path = self.path.with_extension("rewrite");
        remove_if_there(&path)?;
        let written = open_to_append(&path, true).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_data()?;
            fault::point("journal.written");
            fs::rename(&path, &self.path)?;
            Ok(file)
        });
        match written {
            Ok(file) => self.file = Some(file),
            Err(error) => {
                let _ = fs::remove_file(&path);
                return Err(error);
            }
        }
        fault::point("journal.renamed");
        Ok(())
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        remove_if_there(&self.path.with_extension("rewrite"))?;
        remove_if_there(&self.path)
    }

    /// How many bytes the journal at `path` says are on disk. Another process may be writing it.
    pub(super) fn bytes_at(path: &Path) -> u64 {
        let Ok(bytes) = fs::read(path) else { return 0 };
        let records = bytes.chunks(RECORD).filter_map(Record::decode);
        records.fold(0, |sum, record| {
            sum.saturating_add(record.range.end - record.range.start)
        })
    }
}

fn open_to_append(path: &Path, create: bool) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).append(true).create(create).mode(0o600);
    options.open(path)
}

fn existing(path: &Path) -> io::Result<Option<File>> {
    match open_to_append(path, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_and_impossible_records_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.journal");
        let record = |range: Range<u64>| Record { range, checksum: 7 };
        let (mut journal, records) = Journal::open(path.clone(), 100).unwrap();
        assert_eq!(records, []);
        for range in [50..60, 0..10, 5..15, 90..110, 0..LONGEST + 1] {
            journal.append(&record(range)).unwrap();
        }
        fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(&[1; 20])
            .unwrap();

        let (mut journal, records) = Journal::open(path.clone(), 100).unwrap();
        assert_eq!(records, [record(0..10), record(50..60)]);
        journal.append(&record(20..30)).unwrap();
        let (_, records) = Journal::open(path, 100).unwrap();
        assert_eq!(records, [record(0..10), record(20..30), record(50..60)]);
    }

    #[test]
    fn a_rewrite_leaves_the_old_journal_whole_until_the_new_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.journal");
        let records = [0..10, 10..20, 20..30].map(|range| Record { range, checksum: 7 });
        let (mut journal, _) = Journal::open(path.clone(), 100).unwrap();
        journal.append(&records[0]).unwrap();
        journal.append(&records[1]).unwrap();
        let mut old = File::open(&path).unwrap();
        // Nobody has room for a new one.
        let blocked = path.with_extension("rewrite");
        fs::create_dir(&blocked).unwrap();
        journal.rewrite(&records[1..2]).expect_err("rewrote it");
        assert_eq!(Journal::bytes_at(&path), 20);
        fs::remove_dir(&blocked).unwrap();
        // What a killed process left.
        fs::write(&blocked, [1; 20]).unwrap();

        journal.rewrite(&records[1..2]).unwrap();
        journal.append(&records[2]).unwrap();

        let mut bytes = Vec::new();
        old.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 2 * RECORD, "the old one was emptied in place");
        let (journal, found) = Journal::open(path, 100).unwrap();
        assert_eq!(found, records[1..]);
        journal.remove().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_flipped_bit_voids_a_record() {
        let mut bytes = Record {
            range: 1..9,
            checksum: 3,
        }
        .encode();
        assert!(Record::decode(&bytes).is_some());
        bytes[3] ^= 1;
        assert_eq!(Record::decode(&bytes), None);
    }
}
