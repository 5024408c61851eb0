//! A checked call of `gemm` over strided slices.

/// `dst = scale * lhs * rhs (+ dst)` for `[m, k] x [k, n]`, each with (row, column) strides.
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) scale: f32,
    pub(crate) add: bool,
    /// Threads of the pool that share it.
    pub(crate) threads: usize,
}

impl Product {
    pub(crate) fn run(
        &self,
        dst: &mut [f32],
        dst_strides: (usize, usize),
        lhs: &[f32],
        lhs_strides: (usize, usize),
        rhs: &[f32],
        rhs_strides: (usize, usize),
    ) {
        let last = |rows: usize, columns: usize, strides: (usize, usize)| {
            (rows - 1) * strides.0 + (columns - 1) * strides.1
        };
        assert!(last(self.m, self.n, dst_strides) < dst.len(), "product: destination too small");
        assert!(last(self.m, self.k, lhs_strides) < lhs.len(), "product: left side too small");
        assert!(last(self.k, self.n, rhs_strides) < rhs.len(), "product: right side too small");
        #[expect(unsafe_code, reason = "gemm takes raw pointers")]
        // SAFETY: the largest offset that each matrix touches was just checked against its slice, strides are
        // non-negative, and `dst` is borrowed mutably, so it overlaps neither input.
        unsafe {
            gemm::gemm(
                self.m,
                self.n,
                self.k,
                dst.as_mut_ptr(),
                dst_strides.1 as isize,
                dst_strides.0 as isize,
                self.add,
                lhs.as_ptr(),
                lhs_strides.1 as isize,
                lhs_strides.0 as isize,
                rhs.as_ptr(),
                rhs_strides.1 as isize,
                rhs_strides.0 as isize,
                if self.add { 1.0 } else { 0.0 },
                self.scale,
                false,
                false,
                false,
                match self.threads {
                    0 | 1 => gemm::Parallelism::None,
                    threads => gemm::Parallelism::Rayon(threads),
                },
            );
        }
    }
}
