//! What was built once from the same parts is not built again: files in the user's cache, called by what they were built from.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

/// Files of a kind that are kept; older ones go.
const KEPT: usize = 4;

/// What `build` makes of `parts`, or what it made of them before. Without a place for it nothing is kept.
///
/// # Errors
/// Those of `build`.
pub fn cached<E>(
    kind: &str,
    parts: &[&[u8]],
    build: impl FnOnce() -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    match directory() {
        Some(directory) => cached_in(&directory, kind, parts, build),
        None => build(),
    }
}

/// `$XDG_CACHE_HOME/cleanslate`, or what stands for it (XDG Base Directory Specification).
fn directory() -> Option<PathBuf> {
    let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("cleanslate"))
}

fn cached_in<E>(
    directory: &Path,
    kind: &str,
    parts: &[&[u8]],
    build: impl FnOnce() -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    let path = directory.join(format!("{kind}-{}", digest(parts)));
    if let Ok(bytes) = fs::read(&path) {
        return Ok(bytes);
    }
    let bytes = build()?;
    // Who cannot keep it builds it again next time.
    let _ = keep(directory, kind, &path, &bytes);
    Ok(bytes)
}

/// Of the contents, and of the version of what builds from them.
fn digest(parts: &[&[u8]]) -> String {
    let mut words = Vec::new();
    for seed in 0..2_u8 {
        let mut hasher = DefaultHasher::new();
        seed.hash(&mut hasher);
        env!("CARGO_PKG_VERSION").hash(&mut hasher);
        parts.hash(&mut hasher);
        words.push(format!("{:016x}", hasher.finish()));
    }
    words.concat()
}

/// Under another name first, so that what has the name is whole.
fn keep(directory: &Path, kind: &str, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(directory)?;
    let unfinished = directory.join(format!(".{kind}-{}", std::process::id()));
    let written = fs::write(&unfinished, bytes).and_then(|()| fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written?;
    let of_kind = fs::read_dir(directory)?.flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix(kind)?.starts_with('-').then_some(())?;
        Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
    });
    let mut of_kind: Vec<_> = of_kind.collect();
    of_kind.sort();
    for (_, old) in of_kind.iter().rev().skip(KEPT) {
        fs::remove_file(old)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(directory: &Path, parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut built = false;
        let bytes = cached_in(directory, "thing", parts, || {
            built = true;
            Ok::<_, ()>(parts.concat())
        });
        (bytes.unwrap(), built)
    }

    #[test]
    fn the_same_parts_are_built_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new");
        assert_eq!(get(&dir, &[b"ab", b"c"]), (b"abc".to_vec(), true));
        assert_eq!(get(&dir, &[b"ab", b"c"]), (b"abc".to_vec(), false));
        assert_eq!(get(&dir, &[b"a", b"bc"]), (b"abc".to_vec(), true), "cut elsewhere");
        assert_eq!(get(&dir, &[b"ab", b"d"]), (b"abd".to_vec(), true));
    }

    #[test]
    fn a_few_are_kept_and_what_is_in_the_way_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..9_u8 {
            get(dir.path(), &[&[number]]);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), KEPT);
        let file = dir.path().join("file");
        fs::write(&file, b"").unwrap();
        assert_eq!(get(&file, &[b"x"]), (b"x".to_vec(), true));
        assert_eq!(get(&file, &[b"x"]), (b"x".to_vec(), true));
    }
}
