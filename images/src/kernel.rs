//! Linux kernels that are installed on this machine, and their modules.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Where distributions install kernels.
const KERNELS: &str = "/boot";
/// Where they install modules, in a directory for each release.
const MODULES: &str = "/lib/modules";
/// What one file may have: more than any kernel, and less than an archive's 4 GiB.
const MAX_BYTES: u64 = 1 << 30;

/// Why there is no kernel, or none that can be used.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// None is installed.
    #[error(
        "no kernel with modules in {KERNELS} (vmlinuz-RELEASE or vmlinux-RELEASE): install one, on Debian the package \
         linux-image-cloud-amd64"
    )]
    NoKernel,
    /// A file cannot be read.
    #[error("read {path:?}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is none.
    #[error(
        "kernel {0:?} does not say which release of Linux it is: neither a bzImage nor an ELF of one"
    )]
    NoRelease(PathBuf),
    /// Its modules are not there.
    #[error(
        "the modules of Linux {release}, the kernel {kernel:?}, are not in {MODULES}/{release}: install the package that \
         the kernel is from"
    )]
    NoModules {
        /// The kernel.
        kernel: PathBuf,
        /// Its release.
        release: String,
    },
    /// A module is neither there nor built in.
    #[error(
        "Linux {release}, the kernel {kernel:?}, has no module {module}, nor is it built in; take another kernel"
    )]
    NoModule {
        /// The kernel.
        kernel: PathBuf,
        /// Its release.
        release: String,
        /// The module.
        module: String,
    },
    /// There is no bzImage of it.
    #[error(
        "kernel {kernel:?} is an ELF, and the bzImage of it that kexec and QEMU take is not at {wanted:?}"
    )]
    NotPacked {
        /// The kernel.
        kernel: PathBuf,
        /// Where it was looked for.
        wanted: PathBuf,
    },
    /// The kernel's compressed part is broken.
    #[error("kernel {0:?} is a bzImage whose compressed part is broken: {1}")]
    Broken(PathBuf, &'static str),
}

/// A kernel and where its modules are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The file: a bzImage or an ELF.
    pub path: PathBuf,
    /// Its release, as `uname -r` has it.
    pub release: String,
    modules: PathBuf,
}

/// A module's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Where it is.
    pub path: PathBuf,
    /// Without its directory, such as `vsock.ko`.
    pub file: String,
    /// What is in it.
    pub contents: Vec<u8>,
}

impl Kernel {
    /// The newest kernel that is installed with its modules; one for cloud machines before all others, since it is smaller, and
    /// an ELF before a bzImage, since it need not unpack itself.
    ///
    /// # Errors
    /// [`KernelError::NoKernel`].
    pub fn find() -> Result<Self, KernelError> {
        Self::find_in(Path::new(KERNELS), Path::new(MODULES))
    }

    /// The same for QEMU, which takes a bzImage alone where a kernel has no PVH note.
    ///
    /// # Errors
    /// [`KernelError::NoKernel`].
    pub fn find_packed() -> Result<Self, KernelError> {
        let kernel = Self::find()?;
        let path = kernel.packed()?;
        Ok(Self { path, ..kernel })
    }

    /// The file of the same kernel as a bzImage: this one, or the one that is installed under the same release.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn packed(&self) -> Result<PathBuf, KernelError> {
        if !self.is_elf()? {
            return Ok(self.path.clone());
        }
        let path = Path::new(KERNELS).join(format!("vmlinuz-{}", self.release));
        match path.is_file() {
            true => Ok(path),
            false => Err(KernelError::NotPacked { kernel: self.path.clone(), wanted: path }),
        }
    }

    fn find_in(kernels: &Path, modules: &Path) -> Result<Self, KernelError> {
        let entries = fs::read_dir(kernels).into_iter().flatten().flatten();
        let found = entries.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let elf = name.strip_prefix("vmlinux-");
            let release = elf.or_else(|| name.strip_prefix("vmlinuz-"))?;
            let directory = modules.join(release);
            let installed = entry.metadata().ok()?.modified().ok()?;
            let rank = (release.contains("cloud"), installed, elf.is_some());
            let kernel = Self { path: entry.path(), release: release.into(), modules: directory };
            kernel.modules.is_dir().then_some((rank, kernel))
        });
        let newest = found.max_by(|(a, _), (b, _)| a.cmp(b));
        newest.map(|(_, kernel)| kernel).ok_or(KernelError::NoKernel)
    }

    /// The kernel in the file `path`.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn of(path: &Path) -> Result<Self, KernelError> {
        let bytes = read(path)?;
        let release = release(&bytes).ok_or_else(|| KernelError::NoRelease(path.into()))?;
        let modules = Path::new(MODULES).join(&release);
        match modules.is_dir() {
            true => Ok(Self { path: path.into(), release, modules }),
            false => Err(KernelError::NoModules { kernel: path.into(), release }),
        }
    }

    /// Whether its file is an ELF, which need not be unpacked.
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn is_elf(&self) -> Result<bool, KernelError> {
        let mut magic = [0; 4];
        let got = fs::File::open(&self.path).and_then(|mut file| file.read_exact(&mut magic));
        match got {
            Ok(()) => Ok(magic == *b"\x7fELF"),
            Err(source) => Err(KernelError::Read { path: self.path.clone(), source }),
        }
    }

    /// The modules `names` with all that they need, in the order of loading. What is built in needs no file.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>, KernelError> {
        let files = self.files(names)?;
        let module = |file: &PathBuf| {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok(Module { path: file.clone(), file: name, contents: read(file)? })
        };
        files.iter().map(module).collect()
    }

    /// What says which modules there are and what they need, and which are built in: paths and texts.
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn lists(&self) -> Result<[(PathBuf, String); 2], KernelError> {
        let list = |file: &str| {
            let path = self.modules.join(file);
            match fs::read_to_string(&path) {
                Ok(text) => Ok((path, text)),
                Err(source) => Err(KernelError::Read { path, source }),
            }
        };
        Ok([list("modules.dep")?, list("modules.builtin")?])
    }

    /// Paths of files, as [`Self::modules`].
    fn files(&self, names: &[&str]) -> Result<Vec<PathBuf>, KernelError> {
        let [(_, dependencies), (_, built_in)] = self.lists()?;
        let mut files: Vec<PathBuf> = Vec::new();
        for name in names {
            let line = dependencies.lines().find_map(|line| {
                let (file, needs) = line.split_once(':')?;
                is_module(file, name).then_some((file, needs))
            });
            match line {
                // What comes last is needed by what is before it.
                Some((file, needs)) => {
                    for file in needs.split_whitespace().rev().chain([file]) {
                        let path = self.modules.join(file);
                        if !files.contains(&path) {
                            files.push(path);
                        }
                    }
                }
                None if built_in.lines().any(|file| is_module(file, name)) => {}
                None => {
                    return Err(KernelError::NoModule {
                        kernel: self.path.clone(),
                        release: self.release.clone(),
                        module: (*name).into(),
                    });
                }
            }
        }
        Ok(files)
    }
}

/// Whether `file`, such as `kernel/drivers/char/hw_random/virtio-rng.ko.xz`, is the module `name`. Either sign joins words.
fn is_module(file: &str, name: &str) -> bool {
    let last = file.rsplit('/').next().unwrap_or_default();
    let plain = |text: &str| text.replace('-', "_");
    last.split_once(".ko").is_some_and(|(stem, _)| plain(stem) == plain(name))
}

/// Reads a regular file of up to [`MAX_BYTES`]. Others may block or have no end.
///
/// # Errors
/// [`KernelError::Read`].
pub fn read(path: &Path) -> Result<Vec<u8>, KernelError> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
    let bytes = fs::metadata(path).and_then(|metadata| {
        if !metadata.is_file() {
            return Err(invalid("not a regular file"));
        }
        if metadata.len() > MAX_BYTES {
            return Err(invalid("larger than 1 GiB"));
        }
        fs::read(path)
    });
    bytes.map_err(|source| KernelError::Read { path: path.into(), source })
}

/// The release in a kernel's file: in the header of a bzImage (arch/x86/boot.rst, `kernel_version`), in the banner of an ELF.
fn release(bytes: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let text = match bytes.get(0x202..0x206) == Some(b"HdrS") {
        true => {
            let place: &[u8; 2] = bytes.get(0x20e..)?.first_chunk()?;
            bytes.get(usize::from(u16::from_le_bytes(*place)) + 0x200..)?
        }
        false => {
            let mut windows = bytes.windows(BANNER.len());
            let place = windows.position(|window| window == BANNER)?;
            &bytes[place + BANNER.len()..]
        }
    };
    let word = text.split(|byte| !byte.is_ascii_graphic()).next()?;
    // It becomes part of a path.
    let plain = !word.is_empty() && word.len() < 65 && !word.contains(&b'/');
    plain.then(|| String::from_utf8_lossy(word).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_in_either_kind_of_file() {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e] = 0x80;
        image[0x280..0x28e].copy_from_slice(b"6.1.0-4-x (deb");
        assert_eq!(release(&image).as_deref(), Some("6.1.0-4-x"));
        let elf = b"\x7fELF....Linux version 6.12.3 (gcc)\n\0";
        assert_eq!(release(elf).as_deref(), Some("6.12.3"));
        image[0x280..0x28e].copy_from_slice(b"../../../etc/x");
        assert_eq!(release(&image), None);
        assert_eq!(release(b"\x7fELF without a banner"), None);
        assert_eq!(release(b""), None);
    }

    #[test]
    fn only_regular_files_of_some_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("large");
        fs::File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        let why = |path: &Path| match read(path).unwrap_err() {
            KernelError::Read { source, .. } => source.to_string(),
            other => panic!("{other}"),
        };
        assert_eq!(why(&path), "larger than 1 GiB");
        assert_eq!(why(dir.path()), "not a regular file");
        assert_eq!(why(Path::new("/dev/null")), "not a regular file");
        fs::write(&path, b"small").unwrap();
        assert_eq!(read(&path).unwrap(), b"small");
    }

    #[test]
    fn a_modules_name_is_its_files_whatever_joins_its_words() {
        assert!(is_module("kernel/drivers/char/hw_random/virtio-rng.ko", "virtio_rng"));
        assert!(is_module("kernel/net/vmw_vsock/vsock.ko.xz", "vsock"));
        assert!(!is_module("kernel/net/vmw_vsock/vsock_diag.ko", "vsock"));
    }

    /// A machine with kernels of these names, and modules for them.
    fn machine(kernels: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in kernels {
            fs::write(dir.path().join(name), b"").unwrap();
            let modules = dir.path().join(&name["vmlinuz-".len()..]);
            fs::create_dir_all(modules.join("kernel")).unwrap();
            let dependencies =
                "kernel/a.ko: kernel/c.ko kernel/b.ko\nkernel/b.ko:\nkernel/c.ko: kernel/b.ko\n";
            fs::write(modules.join("modules.dep"), dependencies).unwrap();
            fs::write(modules.join("modules.builtin"), "kernel/built_in.ko\n").unwrap();
            for name in ["a", "b", "c"] {
                fs::write(modules.join(format!("kernel/{name}.ko")), name).unwrap();
            }
        }
        dir
    }

    #[test]
    fn modules_come_after_what_they_need_and_each_once() {
        let dir = machine(&["vmlinuz-1-cloud"]);
        let kernel = Kernel::find_in(dir.path(), dir.path()).unwrap();
        let files = |names| {
            let modules = kernel.modules(names).unwrap();
            modules.into_iter().map(|module| module.file).collect::<Vec<_>>()
        };
        assert_eq!(files(&["a"]), ["b.ko", "c.ko", "a.ko"]);
        assert_eq!(files(&["c", "built-in", "a"]), ["b.ko", "c.ko", "a.ko"]);
        let error = kernel.modules(&["d"]).unwrap_err().to_string();
        assert!(error.contains("has no module d, nor"), "{error}");
    }

    #[test]
    fn kernels_for_clouds_and_unpacked_ones_come_first() {
        // Each was installed a second after the one before it.
        let of = |kernels: &[&str]| {
            let dir = machine(kernels);
            for (second, name) in (1..).zip(kernels) {
                let file = fs::File::options().write(true).open(dir.path().join(name)).unwrap();
                let time =
                    std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(second);
                file.set_modified(time).unwrap();
            }
            let kernel = Kernel::find_in(dir.path(), dir.path()).unwrap();
            kernel.path.file_name().unwrap().to_string_lossy().into_owned()
        };
        assert_eq!(of(&["vmlinuz-1-cloud-amd64", "vmlinuz-2-amd64"]), "vmlinuz-1-cloud-amd64");
        assert_eq!(of(&["vmlinuz-2-amd64", "vmlinuz-1-amd64"]), "vmlinuz-1-amd64");
        assert_eq!(of(&["vmlinuz-1-amd64", "vmlinuz-2-amd64"]), "vmlinuz-2-amd64");
        let dir = machine(&["vmlinuz-1"]);
        fs::remove_dir_all(dir.path().join("1")).unwrap();
        let error = Kernel::find_in(dir.path(), dir.path()).unwrap_err().to_string();
        assert!(error.contains("linux-image-cloud-amd64"), "{error}");
    }
}
