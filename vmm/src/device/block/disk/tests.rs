use std::os::fd::AsRawFd;

use super::*;

fn open(path: &Path, read_only: bool) -> Result<Disk, DiskError> {
    Disk::open(&DiskConfig { path: path.into(), read_only })
}

#[test]
fn a_disk_is_a_path_and_perhaps_read_only() {
    let check = |text: &str, expected: Option<(&str, bool)>| {
        let expected =
            expected.map(|(path, read_only)| DiskConfig { path: path.into(), read_only });
        assert_eq!(text.parse().ok(), expected, "{text}");
    };
    check("disk.img", Some(("disk.img", false)));
    check("a,b.img", Some(("a,b.img", false)));
    check("disk.img,ro", Some(("disk.img", true)));
    check("disk.img,ro,ro", Some(("disk.img,ro", true)));
    check("ro", Some(("ro", false)));
    check("", None);
    check(",ro", None);
}

#[test]
fn files_that_are_no_disks_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("odd"), [0; 1000]).unwrap();
    std::fs::write(path("empty"), []).unwrap();
    let fifo = rustix::fs::CWD;
    rustix::fs::mknodat(fifo, path("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    let check = |path: &Path, wanted: &str| {
        for read_only in [false, true] {
            let text = open(path, read_only).unwrap_err().to_string();
            assert!(text.contains(wanted), "{path:?}: {text}");
        }
    };
    check(&path("none"), "open disk \"");
    check(dir.path(), "neither a regular file nor a block device");
    check(&path("fifo"), "neither a regular file nor a block device");
    check(Path::new("/dev/null"), "neither a regular file nor a block device");
    check(&path("odd"), "has 1000 bytes");
    check(&path("empty"), "has 0 bytes");
    check(&path("socket"), "open disk \"");
    drop(socket);
    // Nobody may write this one, not even root.
    let text = open(Path::new("/sys/kernel/notes"), false).unwrap_err().to_string();
    assert!(text.contains("\",ro\" behind the path"), "{text}");
}

#[test]
fn a_file_is_shared_only_by_those_that_read() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(512).unwrap();
    let is_in_use = |result: Result<Disk, DiskError>| match result {
        Ok(_) => false,
        Err(DiskError::InUse(path)) => path == file.path(),
        Err(error) => panic!("{error}"),
    };
    let writer = open(file.path(), false).unwrap();
    assert!(is_in_use(open(file.path(), false)));
    assert!(is_in_use(open(file.path(), true)));
    drop(writer);
    let readers = [open(file.path(), true).unwrap(), open(file.path(), true).unwrap()];
    assert!(is_in_use(open(file.path(), false)));
    drop(readers);
    assert!(!is_in_use(open(file.path(), false)));
}

#[test]
fn a_reader_has_no_right_to_write() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let disk = open(file.path(), true).unwrap();
    assert_eq!((disk.capacity(), disk.is_read_only()), (1 << 20, true));
    let flags = rustix::fs::fcntl_getfl(&disk).unwrap();
    assert!(!flags.intersects(rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::RDWR));
}

/// A file in memory, where zeroes cannot be made without writing them, and one on whatever `/tmp` is.
fn files() -> [File; 2] {
    let memory = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    [memory.into(), tempfile::tempfile().unwrap()]
}

#[test]
fn zeroes_come_whether_or_not_the_file_system_knows_how() {
    use std::os::unix::fs::FileExt;
    let go_on = AtomicBool::new(false);
    for (file, may_unmap) in files().iter().flat_map(|file| [(file, false), (file, true)]) {
        file.set_len(0).unwrap();
        file.write_all_at(&[0xa5; 200 << 10], 0).unwrap();
        let disk = open(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref(), false).unwrap();
        let extent = Extent { offset: 1024, len: (150 << 10) + 512 };
        disk.write_zeroes(extent, may_unmap, &go_on).unwrap();
        disk.write_zeroes(Extent { offset: 512, len: 0 }, may_unmap, &go_on).unwrap();
        let mut seen = vec![1; 200 << 10];
        file.read_exact_at(&mut seen, 0).unwrap();
        let (start, end) = (extent.offset as usize, (extent.offset + extent.len) as usize);
        assert!(seen[..start].iter().chain(&seen[end..]).all(|byte| *byte == 0xa5));
        assert!(seen[start..end].iter().all(|byte| *byte == 0));
        assert_eq!(file.metadata().unwrap().len(), 200 << 10);
    }
}

#[test]
fn what_is_discarded_is_no_longer_stored() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    for file in files() {
        file.write_all_at(&[0xa5; 256 << 10], 0).unwrap();
        file.sync_all().unwrap();
        let before = file.metadata().unwrap().blocks();
        let disk = open(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref(), false).unwrap();
        disk.discard(Extent { offset: 64 << 10, len: 128 << 10 }).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), before - 256, "of {before}");
        assert_eq!(file.metadata().unwrap().len(), 256 << 10);
    }
}

#[test]
fn steps_stop_where_something_stops_them() {
    let extent = Extent { offset: 10, len: 3 * MOST_BYTES };
    let go_on = AtomicBool::new(false);
    let mut seen = Vec::new();
    let whole = in_steps(extent, &go_on, |offset, done, len| {
        seen.push((offset, done, len));
        // The first call is interrupted, and no call moves all that it may.
        match seen.len() {
            1 => Err(ErrorKind::Interrupted.into()),
            _ => Ok(len.min(2 * MOST_BYTES / 3) as usize),
        }
    });
    assert!(whole.0 == extent.len && whole.1.is_ok());
    assert_eq!(seen[..2], [(10, 0, MOST_BYTES); 2]);
    assert!(seen.iter().all(|(offset, done, _)| *offset == 10 + done));
    let (done, result) = in_steps(extent, &AtomicBool::new(true), |_, _, _| panic!("cancelled"));
    assert_eq!((done, result.unwrap_err().kind()), (0, ErrorKind::Interrupted));
    let check = |moved: fn() -> io::Result<usize>, expected| {
        let (done, result) =
            in_steps(extent, &go_on, |_, done, _| if done == 0 { Ok(5) } else { moved() });
        assert_eq!((done, result.unwrap_err().kind()), expected);
    };
    check(|| Ok(0), (5, ErrorKind::UnexpectedEof));
    check(|| Err(ErrorKind::StorageFull.into()), (5, ErrorKind::StorageFull));
}
