//! What is packed in a bzImage: the kernel as an ELF. A monitor that boots that spares the guest unpacking itself.

use lz4_flex::block::decompress_into;

/// First word of what `lz4 -l` writes, which is how the kernel's build packs itself.
const LZ4_LEGACY: u32 = 0x184c_2102;
/// What a block of that holds unpacked, at most.
const LZ4_BLOCK: usize = 8 << 20;
/// No kernel is larger.
const MAX_BYTES: usize = 512 << 20;

/// The ELF in a bzImage. `None` if the file is none, or packed in a way that is not known here: then it has to unpack itself.
///
/// # Errors
/// What is wrong with the packed part.
pub fn elf(image: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
    const VERSION_WITH_PAYLOAD: u16 = 0x208;
    let u32_at = |at: usize| {
        let bytes = image.get(at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let version = image.get(0x206..).and_then(|bytes| bytes.first_chunk()).copied();
    let is_image = image.get(0x202..0x206) == Some(b"HdrS")
        && version.is_some_and(|bytes| u16::from_le_bytes(bytes) >= VERSION_WITH_PAYLOAD);
    if !is_image {
        return Ok(None);
    }
    let (offset, len) = (u32_at(0x248), u32_at(0x24c));
    let (Some(offset), Some(len)) = (offset, len) else { return Err("it ends in its header") };
    // As arch/x86/boot.rst says: counted from the protected-mode part, behind the sectors of the set-up.
    let setup = (usize::from(image[0x1f1].max(1)) + 1) * 512;
    let start = setup.saturating_add(offset as usize);
    let packed = start.checked_add(len as usize).and_then(|end| image.get(start..end));
    let packed = packed.ok_or("it ends behind the end of the file")?;
    let Some(magic) = packed.first_chunk() else { return Err("it is empty") };
    if u32::from_le_bytes(*magic) != LZ4_LEGACY {
        return Ok(None);
    }
    let elf = lz4_legacy(&packed[4..])?;
    match elf.starts_with(b"\x7fELF") {
        true => Ok(Some(elf)),
        false => Err("what is in it is no ELF"),
    }
}

/// Blocks, each behind its length. The kernel's build adds the unpacked length at the end, which can be taken for a block's.
fn lz4_legacy(mut packed: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut unpacked = Vec::new();
    while let Some((len, rest)) = packed.split_first_chunk() {
        let len = u32::from_le_bytes(*len) as usize;
        if rest.is_empty() {
            return if len == unpacked.len() { Ok(unpacked) } else { Err("its length is wrong") };
        }
        let block = rest.get(..len).ok_or("a block is cut off")?;
        let end = unpacked.len();
        if end > MAX_BYTES {
            return Err("it is larger than any kernel");
        }
        unpacked.resize(end + LZ4_BLOCK, 0);
        let got = decompress_into(block, &mut unpacked[end..]).map_err(|_| "a block is broken")?;
        unpacked.truncate(end + got);
        packed = &rest[len..];
    }
    Err("its length is missing")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage of one sector of set-up with `packed` in it.
    fn image(packed: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(packed.len() as u32).to_le_bytes());
        image.extend([0; 16]);
        image.extend(packed);
        image
    }

    /// Blocks of literals alone, as short as they are here.
    fn packed(blocks: &[&[u8]]) -> Vec<u8> {
        let mut packed = LZ4_LEGACY.to_le_bytes().to_vec();
        for block in blocks {
            packed.extend((block.len() as u32 + 1).to_le_bytes());
            packed.push((block.len() as u8) << 4);
            packed.extend(*block);
        }
        let len: usize = blocks.iter().map(|block| block.len()).sum();
        packed.extend((len as u32).to_le_bytes());
        packed
    }

    #[test]
    fn the_elf_comes_out_of_all_blocks() {
        let image = image(&packed(&[b"\x7fELF", b" and", b" more"]));
        assert_eq!(elf(&image), Ok(Some(b"\x7fELF and more".to_vec())));
    }

    #[test]
    fn what_is_no_bzimage_or_packed_otherwise_is_left_alone() {
        assert_eq!(elf(b"\x7fELF"), Ok(None));
        assert_eq!(elf(&[]), Ok(None));
        assert_eq!(elf(&image(b"\x28\xb5\x2f\xfd zstd")), Ok(None));
    }

    #[test]
    fn what_is_broken_is_said() {
        let whole = image(&packed(&[b"\x7fELF", b" and"]));
        for cut in 0x24a..whole.len() {
            assert!(elf(&whole[..cut]).is_err(), "cut at {cut}");
        }
        assert_eq!(elf(&image(&packed(&[b"text"]))), Err("what is in it is no ELF"));
        let mut torn = packed(&[b"\x7fELF", b" and"]);
        let end = torn.len();
        torn[end - 4] ^= 1;
        assert_eq!(elf(&image(&torn)), Err("its length is wrong"));
        torn[8] = 0xff;
        assert_eq!(elf(&image(&torn)), Err("a block is broken"));
    }
}
