//! Durable files: all product code writes its files through this module.
//!
//! A file or folder appears whole by one rename, or not at all. A log line survives a crash once
//! [`AppendLog::sync`] has returned. Opening a log removes a torn last line.
//!
//! Deliberately absent: recovery from disk faults. Damaged lines in the middle of a log are counted and
//! skipped.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Reason for which a file could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    /// The disk is full. Nothing is lost; the same command resumes once there is space.
    #[error("no space left on the disk for `{path}`; free some space and run the same command again")]
    DiskFull {
        /// File that was being written.
        path: PathBuf,
    },
    /// Another process holds the lock of the file.
    #[error("`{path}` is in use by another process; wait for it, or choose another folder")]
    InUse {
        /// Locked file.
        path: PathBuf,
    },
    /// Any other I/O error.
    #[error("cannot {action} `{path}`: {source}")]
    Io {
        /// Attempted action, an infinitive phrase such as `sync`.
        action: &'static str,
        /// File of the action.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// Returns a converter that adds the action and the path to an I/O error.
fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DurableError {
    let path = path.to_owned();
    move |source| {
        if source.kind() == io::ErrorKind::StorageFull {
            DurableError::DiskFull { path }
        } else {
            DurableError::Io { action, path, source }
        }
    }
}

/// Flushes the entries of `folder` to the disk, so that a rename inside survives a crash.
fn sync_folder(folder: &Path) -> Result<(), DurableError> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder).and_then(|file| file.sync_all()).map_err(io_error("sync the folder", folder))
}

/// Creates `folder` and its missing parents.
pub fn create_folder(folder: &Path) -> Result<(), DurableError> {
    fs::create_dir_all(folder).map_err(io_error("create the folder", folder))
}

/// Replaces `path` by a file with the content `bytes`: temporary file, fsync, rename, fsync of the folder.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), DurableError> {
    write_file_with(path, |file| file.write_all(bytes))
}

/// Replaces `path` by a file whose content `fill` writes in pieces; otherwise like [`write_file`].
pub fn write_file_with(
    path: &Path,
    fill: impl FnOnce(&mut io::BufWriter<File>) -> io::Result<()>,
) -> Result<(), DurableError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    // Each write has its own temporary file, so that two threads can replace one path; the last rename wins.
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let write = WRITES.fetch_add(1, Ordering::Relaxed);
    let temporary = folder.join(format!(".{name}.{}.{write}.tmp", std::process::id()));
    #[expect(clippy::disallowed_methods, reason = "this is the durable writer itself")]
    let written = File::create(&temporary).and_then(|file| {
        let mut writer = io::BufWriter::with_capacity(1 << 16, file);
        fill(&mut writer)?;
        writer.flush()?;
        writer.get_ref().sync_all()
    });
    if let Err(error) = written {
        let _gone = fs::remove_file(&temporary);
        return Err(io_error("write", path)(error));
    }
    fs::rename(&temporary, path).map_err(io_error("rename into", path))?;
    sync_folder(folder)
}

/// Fills a temporary folder beside `path`, then renames the folder to `path`.
///
/// An existing folder is replaced. A crash between the two renames leaves the old folder, the new folder, or
/// none, never a mixture.
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
        fs::rename(path, &old).map_err(io_error("move away", path))?;
        fs::rename(&temporary, path).map_err(io_error("rename into", path))?;
        remove_folder(&old)?;
    } else {
        fs::rename(&temporary, path).map_err(io_error("rename into", path))?;
    }
    Ok(sync_folder(parent)?)
}

/// Flushes the finished file `part` to the disk, then renames the file to `path`.
pub fn publish_file(part: &Path, path: &Path) -> Result<(), DurableError> {
    File::open(part).and_then(|file| file.sync_all()).map_err(io_error("sync", part))?;
    fs::rename(part, path).map_err(io_error("rename into", path))?;
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// Removes a file. A missing file is not an error.
pub fn remove_file(path: &Path) -> Result<(), DurableError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a folder with its contents. A missing folder is not an error.
pub fn remove_folder(path: &Path) -> Result<(), DurableError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Append-only log with one line `crc32 payload` per entry; the checksum has eight hexadecimal digits.
///
/// Entries are durable after [`AppendLog::sync`]. An exclusive file lock keeps other writers out.
#[derive(Debug)]
pub struct AppendLog {
    path: PathBuf,
    file: io::BufWriter<File>,
    end: u64,
}

/// Bytes before a payload: the digits of the checksum and a space.
const CHECKSUM_PREFIX_BYTES: u64 = 9;

/// Result of opening or scanning a log.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LogScanSummary {
    /// Number of valid lines.
    pub lines: u64,
    /// Bytes of a torn tail that were removed.
    pub cut_bytes: u64,
    /// Number of damaged lines before the tail, which were skipped. They come from a disk fault, not from a
    /// crash.
    pub damaged_lines: u64,
}

impl AppendLog {
    /// Opens or creates the log at `path`, passes each valid payload with its offset to `line`, and removes a
    /// torn tail.
    ///
    /// Fails with [`DurableError::InUse`] if another process holds the lock.
    pub fn open(
        path: &Path,
        mut line: impl FnMut(u64, &str),
    ) -> Result<(Self, LogScanSummary), DurableError> {
        let is_new = !path.exists();
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(io_error("open the log", path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(DurableError::InUse { path: path.to_owned() }),
            Err(fs::TryLockError::Error(source)) => return Err(io_error("lock", path)(source)),
        }
        let reader = file.try_clone().map_err(io_error("open", path))?;
        let ScanResult { mut recovery, offset, good_end, last_line_end } =
            scan(reader, &mut line).map_err(io_error("read the log", path))?;
        let mut end = offset;
        // Damage at the end of the log is a torn tail; damage before a valid line is kept.
        let torn = is_tail_torn(&mut file, good_end, offset);
        if torn || last_line_end < offset {
            // A torn tail is removed whole. Behind several damaged lines, only the unfinished last line is
            // removed.
            let keep = if torn { good_end } else { last_line_end };
            recovery.cut_bytes = offset - keep;
            recovery.damaged_lines -= u64::from(torn && recovery.damaged_lines > 0);
            end = keep;
            file.set_len(end).map_err(io_error("cut the torn tail of", path))?;
            file.sync_all().map_err(io_error("sync", path))?;
        }
        if is_new {
            sync_folder(path.parent().unwrap_or(Path::new(".")))?;
        }
        Ok((Self { path: path.to_owned(), file: io::BufWriter::with_capacity(1 << 16, file), end }, recovery))
    }

    /// Passes each valid payload with its offset to `line`, without lock and without changes.
    ///
    /// Another process can write the log meanwhile.
    pub fn scan_log(path: &Path, mut line: impl FnMut(u64, &str)) -> Result<LogScanSummary, DurableError> {
        let file = File::open(path).map_err(io_error("open the log", path))?;
        Ok(scan(file, &mut line).map_err(io_error("read the log", path))?.recovery)
    }

    /// Appends a payload without line breaks and returns its offset in bytes.
    ///
    /// The entry is durable and readable only after [`AppendLog::sync`].
    pub fn append(&mut self, payload: &str) -> Result<u64, DurableError> {
        debug_assert!(!payload.contains('\n'));
        writeln!(self.file, "{:08x} {payload}", crc32fast::hash(payload.as_bytes()))
            .map_err(io_error("append to", &self.path))?;
        let begin = self.end + CHECKSUM_PREFIX_BYTES;
        self.end = begin + payload.len() as u64 + 1;
        Ok(begin)
    }

    /// Returns a reader of payloads by offset, for use beside the writer.
    pub fn reader(&self) -> Result<LineReader, DurableError> {
        // A new descriptor, because a duplicate would keep the lock of the log for its own lifetime.
        LineReader::open(&self.path)
    }

    /// Flushes all appended lines to the disk. One call for many lines is a group commit.
    pub fn sync(&mut self) -> Result<(), DurableError> {
        self.file.flush().map_err(io_error("append to", &self.path))?;
        self.file.get_ref().sync_data().map_err(io_error("sync", &self.path))
    }
}

/// Reader of the lines of a file by offset.
#[derive(Debug)]
pub struct LineReader {
    path: PathBuf,
    file: File,
}

impl LineReader {
    /// Opens the file at `path`.
    pub fn open(path: &Path) -> Result<Self, DurableError> {
        let file = File::open(path).map_err(io_error("open", path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Returns the line that begins at byte `offset`, without its line break. Fails on invalid UTF-8.
    pub fn read_line_at(&self, offset: u64) -> Result<String, DurableError> {
        read_line(&self.file, offset).map_err(io_error("read a line of", &self.path))
    }
}

/// Reads from `offset` to the next line break or the end of the file.
fn read_line(file: &File, offset: u64) -> io::Result<String> {
    let (mut line, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        match file.read_at(&mut piece, offset + line.len() as u64) {
            Ok(0) => break,
            Ok(read) => match piece[..read].iter().position(|&byte| byte == b'\n') {
                Some(end) => {
                    line.extend_from_slice(&piece[..end]);
                    break;
                }
                None => line.extend_from_slice(&piece[..read]),
            },
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    String::from_utf8(line).map_err(io::Error::other)
}

/// Temporary file of lines without a directory entry, for data that exceeds memory until its order is known.
///
/// The operating system frees the disk space when the value is dropped or the process ends.
#[derive(Debug)]
pub struct ScratchFile {
    path: PathBuf,
    file: io::BufWriter<File>,
    end: u64,
}

impl ScratchFile {
    /// Creates a scratch file on the disk of the existing folder `folder`.
    pub fn new(folder: &Path) -> Result<Self, DurableError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".scratch.{}.{number}.tmp", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(io_error("open the scratch file", &path))?;
        fs::remove_file(&path).map_err(io_error("hide the scratch file", &path))?;
        Ok(Self { path, file: io::BufWriter::with_capacity(1 << 16, file), end: 0 })
    }

    /// Appends a line without line breaks and returns its offset in bytes.
    pub fn append(&mut self, line: &[u8]) -> Result<u64, DurableError> {
        debug_assert!(!line.contains(&b'\n'));
        let written = self.file.write_all(line).and_then(|()| self.file.write_all(b"\n"));
        written.map_err(io_error("write to", &self.path))?;
        let begin = self.end;
        self.end += line.len() as u64 + 1;
        Ok(begin)
    }

    /// Returns the line at `offset`; flushes the write buffer if the line is not on disk yet.
    pub fn read_line_at(&mut self, offset: u64) -> Result<String, DurableError> {
        if offset >= self.end - self.file.buffer().len() as u64 {
            self.file.flush().map_err(io_error("write to", &self.path))?;
        }
        read_line(self.file.get_ref(), offset).map_err(io_error("read a line of", &self.path))
    }

    /// Ends the writing and returns a reader of the lines.
    pub fn into_reader(self) -> Result<LineReader, DurableError> {
        let file =
            self.file.into_inner().map_err(|error| io_error("write to", &self.path)(error.into_error()))?;
        Ok(LineReader { path: self.path, file })
    }
}

/// Result of reading a log from its beginning.
struct ScanResult {
    recovery: LogScanSummary,
    /// Bytes read, the length of the file.
    offset: u64,
    /// Offset behind the last valid line.
    good_end: u64,
    /// Offset behind the last line break.
    last_line_end: u64,
}

/// Reads a log and passes each valid payload with its offset to `line`.
fn scan(file: File, line: &mut impl FnMut(u64, &str)) -> io::Result<ScanResult> {
    let mut ends =
        ScanResult { recovery: LogScanSummary::default(), offset: 0, good_end: 0, last_line_end: 0 };
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        let read = reader.read_until(b'\n', &mut buffer)?;
        if read == 0 {
            return Ok(ends);
        }
        let begin = ends.offset;
        ends.offset += read as u64;
        if buffer.ends_with(b"\n") {
            ends.last_line_end = ends.offset;
        }
        match verified_payload(&buffer) {
            Some(payload) => {
                line(begin + CHECKSUM_PREFIX_BYTES, payload);
                ends.recovery.lines += 1;
                ends.good_end = ends.offset;
            }
            None if buffer.ends_with(b"\n") => ends.recovery.damaged_lines += 1,
            None => {}
        }
    }
}

/// Opens a plain text file for appending. The lines are not durable: a crash can lose them.
pub fn open_for_append(path: &Path) -> Result<io::BufWriter<File>, DurableError> {
    let file = OpenOptions::new().append(true).create(true).open(path).map_err(io_error("open", path))?;
    Ok(io::BufWriter::new(file))
}

/// Returns the payload of a finished line whose checksum is correct.
fn verified_payload(line: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (crc, payload) = line.split_once(' ')?;
    (u32::from_str_radix(crc, 16).ok()? == crc32fast::hash(payload.as_bytes())).then_some(payload)
}

/// Returns whether the file has at most one damaged line behind the last valid line.
fn is_tail_torn(file: &mut File, good_end: u64, end: u64) -> bool {
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
    fn replaces_a_file_and_leaves_no_temporary_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_file(&path, b"one").unwrap();
        write_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert!(write_file_with(&path, |_| Err(io::Error::from(io::ErrorKind::StorageFull))).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"two", "the old file stays when the new one fails");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn concurrent_writes_to_one_file_each_succeed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("status.json");
        std::thread::scope(|scope| {
            for text in ["one", "two", "three", "four"] {
                let path = &path;
                scope.spawn(move || (0..50).for_each(|_| write_file(path, text.as_bytes()).unwrap()));
            }
        });
        assert!(["one", "two", "three", "four"].contains(&fs::read_to_string(&path).unwrap().as_str()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn keeps_the_old_folder_if_filling_the_new_one_fails() {
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

    #[test]
    fn reads_scratch_lines_by_offset_without_a_directory_entry() {
        let folder = tempfile::tempdir().unwrap();
        let mut scratch = ScratchFile::new(folder.path()).unwrap();
        let texts = ["", "one", &"long ".repeat(3000), "end"];
        let places: Vec<u64> = texts.iter().map(|text| scratch.append(text.as_bytes()).unwrap()).collect();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let lines = scratch.into_reader().unwrap();
        for (place, text) in places.iter().zip(texts).rev() {
            assert_eq!(lines.read_line_at(*place).unwrap(), text);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn keeps_every_finished_line_after_truncation_at_any_byte(payloads in prop::collection::vec("[a-z{} é]{0,20}", 1..20), cut in 0usize..600) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("log");
            {
                let (mut log, _) = AppendLog::open(&path, |_, _| {}).unwrap();
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
            let mut places = Vec::new();
            let (mut log, recovery) = AppendLog::open(&path, |place, line| {
                seen.push(line.to_owned());
                places.push(place);
            }).unwrap();
            prop_assert_eq!(&seen[..], &payloads[..whole]);
            prop_assert_eq!(recovery.damaged_lines, 0);
            places.push(log.append("after").unwrap());
            log.sync().unwrap();
            let lines = log.reader().unwrap();
            for (place, line) in places.iter().zip(seen.iter().map(String::as_str).chain(["after"])) {
                prop_assert_eq!(lines.read_line_at(*place).unwrap(), line);
            }
            drop(log);
            let mut again = Vec::new();
            AppendLog::open(&path, |_, line| again.push(line.to_owned())).unwrap();
            prop_assert_eq!(again.len(), whole + 1);
        }
    }
}
