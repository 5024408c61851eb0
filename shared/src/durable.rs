//! The only place that writes files. A file or folder appears whole by one rename or not at all; a log line that was
//! acknowledged survives a crash; a torn last line is cut off when the log is opened again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Why a file could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    /// The disk is full; nothing was lost, and the same command goes on where it stopped once there is room.
    #[error("no space left on the disk for `{path}`; free some space and run the same command again")]
    DiskFull {
        /// The file.
        path: PathBuf,
    },
    /// Another process writes it.
    #[error("`{path}` is in use by another process; wait for it, or choose another folder")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Any other fault of the file system.
    #[error("cannot {action} `{path}`: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Names the action and the path of an I/O error.
fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DurableError {
    let path = path.to_owned();
    move |source| {
        if source.kind() == io::ErrorKind::StorageFull {
            DurableError::DiskFull { path }
        } else {
            DurableError::Io { action, path, source }
        }
    }
}

/// Makes a rename in `folder` survive a crash.
fn sync_folder(folder: &Path) -> Result<(), DurableError> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder).and_then(|file| file.sync_all()).map_err(at("sync the folder", folder))
}

/// Creates `folder` and its parents.
pub fn create_folder(folder: &Path) -> Result<(), DurableError> {
    fs::create_dir_all(folder).map_err(at("create the folder", folder))
}

/// Writes `bytes` to `path`: temporary file, fsync, rename, fsync of the folder.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), DurableError> {
    write_with(path, |file| file.write_all(bytes))
}

/// Like [`write_file`], for content that is produced piece by piece.
pub fn write_with(
    path: &Path,
    fill: impl FnOnce(&mut io::BufWriter<File>) -> io::Result<()>,
) -> Result<(), DurableError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = folder.join(format!(".{name}.{}.tmp", std::process::id()));
    #[expect(clippy::disallowed_methods, reason = "this is the durable writer itself")]
    let written = File::create(&temporary).and_then(|file| {
        let mut writer = io::BufWriter::with_capacity(1 << 16, file);
        fill(&mut writer)?;
        writer.flush()?;
        writer.get_ref().sync_all()
    });
    if let Err(error) = written {
        let _gone = fs::remove_file(&temporary);
        return Err(at("write", path)(error));
    }
    fs::rename(&temporary, path).map_err(at("rename into", path))?;
    sync_folder(folder)
}

/// Fills a temporary folder and moves it to `path` by one rename. An existing folder of that name is replaced; a crash
/// between leaves the old one, the new one, or none, never a mixture.
pub fn publish_folder<E: From<DurableError>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = parent.join(format!(".{name}.tmp"));
    remove_folder(&temporary)?;
    create_folder(&temporary)?;
    fill(&temporary)?;
    sync_folder(&temporary)?;
    if path.exists() {
        let old = parent.join(format!(".{name}.old"));
        remove_folder(&old)?;
        fs::rename(path, &old).map_err(at("move away", path))?;
        fs::rename(&temporary, path).map_err(at("rename into", path))?;
        remove_folder(&old)?;
    } else {
        fs::rename(&temporary, path).map_err(at("rename into", path))?;
    }
    Ok(sync_folder(parent)?)
}

/// Removes a folder with all it holds; a missing one is no error.
pub fn remove_folder(path: &Path) -> Result<(), DurableError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(error)),
        _ => Ok(()),
    }
}

/// An append-only log of lines `crc32 payload`. What [`AppendLog::sync`] acknowledged is on the disk.
#[derive(Debug)]
pub struct AppendLog {
    path: PathBuf,
    file: io::BufWriter<File>,
}

/// What opening a log found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Whole lines read.
    pub lines: u64,
    /// Bytes of a torn tail that were cut off.
    pub cut_bytes: u64,
    /// Damaged lines before the tail (a disk fault, not a crash), skipped.
    pub damaged_lines: u64,
}

impl AppendLog {
    /// Opens or creates the log, hands each whole payload to `line`, and cuts off a torn tail.
    pub fn open(path: &Path, mut line: impl FnMut(&str)) -> Result<(Self, Recovery), DurableError> {
        let is_new = !path.exists();
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(at("open the log", path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(DurableError::InUse { path: path.to_owned() }),
            Err(fs::TryLockError::Error(source)) => return Err(at("lock", path)(source)),
        }
        let mut recovery = Recovery::default();
        let (mut offset, mut good_end, mut last_line_end) = (0u64, 0u64, 0u64);
        let mut reader = BufReader::with_capacity(1 << 20, file.try_clone().map_err(at("open", path))?);
        let mut buffer = Vec::new();
        loop {
            buffer.clear();
            let read = reader.read_until(b'\n', &mut buffer).map_err(at("read the log", path))?;
            if read == 0 {
                break;
            }
            offset += read as u64;
            if buffer.ends_with(b"\n") {
                last_line_end = offset;
            }
            match checked_payload(&buffer) {
                Some(payload) => {
                    line(payload);
                    recovery.lines += 1;
                    good_end = offset;
                }
                None if buffer.ends_with(b"\n") => recovery.damaged_lines += 1,
                None => {}
            }
        }
        // Damage that no good line follows is a torn tail; damage in the middle stays where it is.
        let torn = tail_is_torn(&mut file, good_end, offset);
        if torn || last_line_end < offset {
            // A torn tail goes whole; where damaged lines stand before it, only the line that was never finished goes.
            let keep = if torn { good_end } else { last_line_end };
            recovery.cut_bytes = offset - keep;
            recovery.damaged_lines -= u64::from(torn && recovery.damaged_lines > 0);
            good_end = keep;
            file.set_len(good_end).map_err(at("cut the torn tail of", path))?;
            file.sync_all().map_err(at("sync", path))?;
        }
        if is_new {
            sync_folder(path.parent().unwrap_or(Path::new(".")))?;
        }
        Ok((Self { path: path.to_owned(), file: io::BufWriter::with_capacity(1 << 16, file) }, recovery))
    }

    /// Appends a payload (no line breaks inside). It is safe only after [`AppendLog::sync`].
    pub fn append(&mut self, payload: &str) -> Result<(), DurableError> {
        debug_assert!(!payload.contains('\n'));
        writeln!(self.file, "{:08x} {payload}", crc32fast::hash(payload.as_bytes()))
            .map_err(at("append to", &self.path))
    }

    /// Brings all appended lines to the disk. One call for many lines is a group commit.
    pub fn sync(&mut self) -> Result<(), DurableError> {
        self.file.flush().map_err(at("append to", &self.path))?;
        self.file.get_ref().sync_data().map_err(at("sync", &self.path))
    }
}

/// Opens a plain text file to append lines to; what is written may be lost in a crash.
pub fn append_lines(path: &Path) -> Result<io::BufWriter<File>, DurableError> {
    let file = OpenOptions::new().append(true).create(true).open(path).map_err(at("open", path))?;
    Ok(io::BufWriter::new(file))
}

fn checked_payload(line: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (crc, payload) = line.split_once(' ')?;
    (u32::from_str_radix(crc, 16).ok()? == crc32fast::hash(payload.as_bytes())).then_some(payload)
}

/// True when nothing but one damaged piece stands after the last good line.
fn tail_is_torn(file: &mut File, good_end: u64, end: u64) -> bool {
    if good_end >= end || end - good_end > 64 << 20 {
        return false;
    }
    let mut tail = Vec::new();
    let read = file.seek(SeekFrom::Start(good_end)).and_then(|_| file.read_to_end(&mut tail));
    let _at_end = file.seek(SeekFrom::End(0));
    read.is_ok() && tail.iter().filter(|&&byte| byte == b'\n').count() <= 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_no_litter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_file(&path, b"one").unwrap();
        write_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert!(write_with(&path, |_| Err(io::Error::from(io::ErrorKind::StorageFull))).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"two", "the old file stays when the new one fails");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_folder_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        publish_folder::<DurableError>(&path, |new| write_file(&new.join("w"), b"1")).unwrap();
        let failed = publish_folder::<DurableError>(&path, |new| {
            write_file(&new.join("w"), b"2")?;
            Err(DurableError::DiskFull { path: new.to_owned() })
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(path.join("w")).unwrap(), b"1");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_crash_at_any_byte_loses_no_synced_line(payloads in prop::collection::vec("[a-z{} é]{0,20}", 1..20), cut in 0usize..600) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("log");
            {
                let (mut log, _) = AppendLog::open(&path, |_| {}).unwrap();
                for payload in &payloads {
                    log.append(payload).unwrap();
                }
                log.sync().unwrap();
            }
            let bytes = fs::read(&path).unwrap();
            let cut = cut.min(bytes.len());
            let whole = bytes[..cut].iter().filter(|&&byte| byte == b'\n').count();
            OpenOptions::new().write(true).open(&path).unwrap().set_len(cut as u64).unwrap();
            let mut seen = Vec::new();
            let (mut log, recovery) = AppendLog::open(&path, |line| seen.push(line.to_owned())).unwrap();
            prop_assert_eq!(&seen[..], &payloads[..whole]);
            prop_assert_eq!(recovery.damaged_lines, 0);
            log.append("after").unwrap();
            log.sync().unwrap();
            drop(log);
            let mut again = Vec::new();
            AppendLog::open(&path, |line| again.push(line.to_owned())).unwrap();
            prop_assert_eq!(again.len(), whole + 1);
        }
    }
}
