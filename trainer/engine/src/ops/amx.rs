//! Tile registers (Intel AMX): eight of 16 rows of 64 bytes, and products of two of them that add up in a third.
//!
//! The instructions are written out, since the compiler's own names for them are not stable. The compiler never touches
//! tile registers, so they keep what they hold between one instruction and the next; a thread that blocks in between keeps
//! them as well.
#![expect(unsafe_code, reason = "instructions that only some processors have")]

use std::sync::OnceLock;

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Bytes of a row.
pub(super) const BYTES: usize = 64;

/// Whether the processor has them and the kernel lets this process have them: it has to be asked, since they make every
/// thread's state eight KiB larger (Linux, Documentation/arch/x86/xstate.rst).
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: the call changes nothing but a permission, and fails where it is not known.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    })
}

/// The shape of each tile: rows, and bytes of a row.
pub(super) type Shapes = [(usize, usize); 8];

/// The registers of this thread, given back when this goes.
pub(super) struct Tiles(());

impl Tiles {
    /// Shapes the registers.
    ///
    /// # Safety
    ///
    /// [`available`] must have said so.
    pub(super) unsafe fn new(shapes: Shapes) -> Self {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (at, (rows, bytes)) in shapes.into_iter().enumerate() {
            assert!(rows <= ROWS && bytes <= BYTES);
            (config.rows[at], config.row_bytes[at]) = (rows as u8, bytes as u16);
        }
        // SAFETY: the processor has the instruction, by the caller's word; it reads 64 bytes.
        unsafe {
            std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags));
        }
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: only made where the processor has tiles.
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// One instruction on tiles that are named by number: `tile!(zero 0)`, `tile!(load 4, pointer, stride)`,
/// `tile!(store 0, pointer, stride)`, `tile!(dpbf16 0, 4, 6)` for `tile0 += tile4 * tile6`. Strides are in bytes.
macro_rules! tile {
    (zero $t:literal) => {
        std::arch::asm!(concat!("tilezero tmm", $t), options(nostack, nomem, preserves_flags))
    };
    (load $t:literal, $from:expr, $stride:expr) => {
        std::arch::asm!(
            concat!("tileloadd tmm", $t, ", [{from} + {stride}*1]"),
            from = in(reg) $from,
            stride = in(reg) $stride,
            options(nostack, readonly, preserves_flags)
        )
    };
    (store $t:literal, $to:expr, $stride:expr) => {
        std::arch::asm!(
            concat!("tilestored [{to} + {stride}*1], tmm", $t),
            to = in(reg) $to,
            stride = in(reg) $stride,
            options(nostack, preserves_flags)
        )
    };
    (dpbf16 $c:literal, $a:literal, $b:literal) => {
        std::arch::asm!(
            concat!("tdpbf16ps tmm", $c, ", tmm", $a, ", tmm", $b),
            options(nostack, nomem, preserves_flags)
        )
    };
    (dpbsud $c:literal, $a:literal, $b:literal) => {
        std::arch::asm!(
            concat!("tdpbsud tmm", $c, ", tmm", $a, ", tmm", $b),
            options(nostack, nomem, preserves_flags)
        )
    };
}
pub(super) use tile;
