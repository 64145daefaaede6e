//! Tiny guests: a few instructions in an ELF with a PVH note. They run in 32-bit protected mode without paging.

/// Where the code of a tiny guest lies.
const ENTRY: u32 = 0x20_0000;

/// Code of a tiny guest, one instruction after the other.
#[derive(Default)]
pub struct Guest {
    code: Vec<u8>,
}

impl Guest {
    pub fn new() -> Self {
        Self::default()
    }

    /// The instructions.
    pub fn code(&self) -> &[u8] {
        &self.code
    }

    /// Any instruction bytes.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.code.extend_from_slice(bytes);
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// Prints on the first serial port.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |guest, byte| guest.out(0x3f8, byte))
    }

    /// `mov dword [address], value`
    pub fn store(self, address: u32, value: u32) -> Self {
        self.raw(&[0xc7, 0x05]).raw(&address.to_le_bytes()).raw(&value.to_le_bytes())
    }

    /// `mov word [address], value`
    pub fn store16(self, address: u32, value: u16) -> Self {
        self.raw(&[0x66, 0xc7, 0x05]).raw(&address.to_le_bytes()).raw(&value.to_le_bytes())
    }

    /// `mov eax, [address]`
    pub fn load(self, address: u32) -> Self {
        self.raw(&[0xa1]).raw(&address.to_le_bytes())
    }

    /// Waits until `[address]` has any of `bits`: `1: test dword [address], bits; jz 1b`
    pub fn wait_for(self, address: u32, bits: u32) -> Self {
        let test = self.raw(&[0xf7, 0x05]).raw(&address.to_le_bytes()).raw(&bits.to_le_bytes());
        test.raw(&[0x74, (-12_i8) as u8])
    }

    /// Waits until `[address]` is `value`: `1: cmp dword [address], value; jne 1b`
    pub fn wait_until(self, address: u32, value: u32) -> Self {
        let compare = self.raw(&[0x81, 0x3d]).raw(&address.to_le_bytes()).raw(&value.to_le_bytes());
        compare.raw(&[0x75, (-12_i8) as u8])
    }

    /// The same for 16 bits: `1: cmp word [address], value; jne 1b`
    pub fn wait_until16(self, address: u32, value: u16) -> Self {
        let compare = self.raw(&[0x66, 0x81, 0x3d]).raw(&address.to_le_bytes());
        compare.raw(&value.to_le_bytes()).raw(&[0x75, (-11_i8) as u8])
    }

    /// `mov ecx, index; mov eax, low; mov edx, high; wrmsr`
    pub fn write_msr(self, index: u32, value: u64) -> Self {
        let (low, high) = (value as u32, (value >> 32) as u32);
        let index = self.raw(&[0xb9]).raw(&index.to_le_bytes());
        let value =
            index.raw(&[0xb8]).raw(&low.to_le_bytes()).raw(&[0xba]).raw(&high.to_le_bytes());
        value.raw(&[0x0f, 0x30])
    }

    /// `mov ecx, index; rdmsr`
    pub fn read_msr(self, index: u32) -> Self {
        self.raw(&[0xb9]).raw(&index.to_le_bytes()).raw(&[0x0f, 0x32])
    }

    /// Leaves this part out unless `eax` is `value`: `cmp eax, value; jne over`
    pub fn if_eax_is(self, value: u32, then: Self) -> Self {
        let len = u8::try_from(then.code.len()).expect("a short part");
        assert!(len < 0x80, "too long for a short jump");
        self.raw(&[0x3d]).raw(&value.to_le_bytes()).raw(&[0x75, len]).raw(&then.code)
    }

    /// Keeps the processor busy for so many ticks of its time stamp counter:
    /// `rdtsc; mov esi, eax; 1: rdtsc; sub eax, esi; cmp eax, ticks; jb 1b`
    pub fn spin(self, ticks: u32) -> Self {
        let once = self.raw(&[0x0f, 0x31, 0x89, 0xc6, 0x0f, 0x31, 0x29, 0xf0, 0x3d]);
        once.raw(&ticks.to_le_bytes()).raw(&[0x72, (-11_i8) as u8])
    }

    /// Runs `part` again and again: `1: part; jmp 1b`
    pub fn for_ever(self, part: Self) -> Self {
        const JUMP_LEN: i32 = 5;
        let back = -(i32::try_from(part.code.len()).expect("a short part") + JUMP_LEN);
        self.raw(&part.code).raw(&[0xe9]).raw(&back.to_le_bytes())
    }

    /// Turns the machine off by ACPI's sleep control register.
    pub fn power_off(self) -> Self {
        self.out(0x601, 0x34).halt()
    }

    /// `cli; 1: hlt; jmp 1b`
    pub fn halt(self) -> Self {
        self.raw(&[0xfa, 0xf4, 0xeb, 0xfd])
    }

    /// Loads an empty interrupt table and raises #UD: `lidt [zeroes]; ud2`.
    pub fn triple_fault(self) -> Self {
        let zeroes = ENTRY - 16;
        self.raw(&[0x0f, 0x01, 0x1d]).raw(&zeroes.to_le_bytes()).raw(&[0x0f, 0x0b])
    }

    /// An instruction that KVM cannot emulate, where it has to (`int3` on a KVM without hardware), and that a processor
    /// without an interrupt table dies of.
    pub fn breakpoint(self) -> Self {
        self.raw(&[0xcc])
    }

    /// The ELF file: one segment that begins with 16 zero bytes before the code, and the note.
    pub fn elf(&self) -> Vec<u8> {
        self.elf_for(62, ENTRY - 16)
    }

    /// The same with a note of another kind, so that it is not a PVH kernel; the code runs in 64-bit mode.
    pub fn elf_without_note(&self) -> Vec<u8> {
        const NOTE_TYPE: usize = 64 + 2 * 56 + 8;
        let mut elf = self.elf();
        elf[NOTE_TYPE] = 99;
        elf
    }

    /// A bzImage with one setup sector, whose 64-bit entry is the code.
    pub fn bzimage(&self) -> Vec<u8> {
        let mut image = vec![0; 1024 + 0x200];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x211] = 1; // loaded high
        image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
        image[0x236] = 1; // has a 64-bit entry
        image[0x258..0x260].copy_from_slice(&0x10_0000_u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x1_0000_u32.to_le_bytes());
        [image, self.code.clone()].concat()
    }

    /// The same for another machine or address.
    pub fn elf_for(&self, machine: u16, address: u32) -> Vec<u8> {
        const HEADER: u64 = 64;
        const SEGMENT: u64 = 56;
        let note_at = HEADER + 2 * SEGMENT;
        let note =
            [&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0], &b"Xen\0"[..], &ENTRY.to_le_bytes()].concat();
        let text_at = note_at + note.len() as u64;
        let text = [&[0; 16][..], &self.code].concat();

        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        for half in [2, machine] {
            elf.extend_from_slice(&u16::to_le_bytes(half));
        }
        elf.extend_from_slice(&1_u32.to_le_bytes());
        for word in [u64::from(ENTRY), HEADER, 0] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
        elf.extend_from_slice(&0_u32.to_le_bytes());
        for half in [HEADER as u16, SEGMENT as u16, 2, 0, 0, 0] {
            elf.extend_from_slice(&half.to_le_bytes());
        }
        let mut segment = |kind: u32, at: u64, to: u64, len: u64| {
            elf.extend_from_slice(&kind.to_le_bytes());
            elf.extend_from_slice(&7_u32.to_le_bytes());
            for word in [at, to, to, len, len, 4] {
                elf.extend_from_slice(&word.to_le_bytes());
            }
        };
        segment(1, text_at, u64::from(address), text.len() as u64);
        segment(4, note_at, 0, note.len() as u64);
        [elf, note, text].concat()
    }
}
