//! Intel AMX: eight tile registers of 16 rows of 64 bytes, and instructions that add the product of two
//! tiles to a third.
//!
//! The instructions are inline assembly because the compiler's intrinsics are not stable. The compiler
//! never uses tile registers, so they keep their values between instructions. The operating system
//! saves them when a thread is preempted.
#![expect(unsafe_code, reason = "instructions that only some processors have")]

use std::sync::OnceLock;

/// Rows per tile.
pub(super) const TILE_ROWS: usize = 16;
/// Bytes per row of a tile.
pub(super) const TILE_ROW_BYTES: usize = 64;

/// Returns whether CPU and operating system support tiles. Linux grants tile registers on request only, because they
/// enlarge every thread's state by 8 KiB (Documentation/arch/x86/xstate.rst).
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: the call only requests a permission; Linux without AMX support rejects the call.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    })
}

/// Rows and bytes per row of each tile.
pub(super) type TileShapes = [(usize, usize); 8];

/// Configured tile registers of this thread; dropping releases them.
pub(super) struct TileRegisters(());

impl TileRegisters {
    /// Configures the tile registers.
    ///
    /// # Safety
    ///
    /// [`available`] must have returned true.
    pub(super) unsafe fn configure(shapes: TileShapes) -> Self {
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
            assert!(rows <= TILE_ROWS && bytes <= TILE_ROW_BYTES);
            (config.rows[at], config.row_bytes[at]) = (rows as u8, bytes as u16);
        }
        // SAFETY: the caller guarantees that the CPU has the instruction, which reads the 64 bytes of
        // `config`.
        unsafe {
            std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags));
        }
        Self(())
    }
}

impl Drop for TileRegisters {
    fn drop(&mut self) {
        // SAFETY: a `Tiles` value exists only where the CPU has tiles.
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Emits one tile instruction; tiles are named by number. Forms: `tile!(zero 0)`, `tile!(load 4, pointer,
/// stride)`, `tile!(store 0, pointer, stride)`. `tile!(dpbf16 0, 4, 6)` computes `tile0 += tile4 * tile6`.
/// Strides are in bytes.
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
