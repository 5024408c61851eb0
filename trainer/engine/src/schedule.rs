//! The scheduler: chooses the sequences of the next step, their rows and their KV cache blocks. The module
//! uses no tensors, clocks or channels, so a test runs thousands of random schedules in a second.
//!
//! Each decoding sequence gets one row. Prompts share the rest of the step's budget; short prompts finish
//! first and do not wait for long ones. A sequence starts when blocks for all its tokens are free. If a
//! decoding sequence finds no free block, the youngest sequence is preempted and recomputed later, often
//! from the prefix cache. A prompt waits while another sequence computes the same prefix.

use std::collections::{HashSet, VecDeque};

use crate::kv::blocks::{BlockAllocator, BlockHash};

/// Bounds of a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepLimits {
    /// Maximum number of running sequences.
    pub(crate) running: usize,
    /// Target number of rows per step.
    pub(crate) rows: usize,
}

/// A sequence in the scheduler, with a payload of the caller.
#[derive(Debug)]
pub(crate) struct Sequence<T> {
    /// Token ids of the prompt and of the completion so far.
    tokens: Vec<u32>,
    /// Length of the prompt in tokens.
    prompt_len: usize,
    /// Number of tokens whose keys and values are in the blocks.
    computed_tokens: usize,
    /// Numbers of the sequence's blocks, in token order.
    block_table: Vec<u32>,
    /// Prefix cache keys of the full blocks, in token order.
    block_hashes: Vec<BlockHash>,
    /// Whether the sequence may reuse blocks of the prefix cache.
    use_prefix_cache: bool,
    /// Number of prompt tokens from the prefix cache at the first start; `None` before.
    cached_tokens: Option<usize>,
    /// Data of the caller.
    pub(crate) payload: T,
}

impl<T> Sequence<T> {
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_len]
    }

    pub(crate) fn completion(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    /// Returns prompt, completion and payload.
    pub(crate) fn split_mut(&mut self) -> (&[u32], &[u32], &mut T) {
        let (prompt, completion) = self.tokens.split_at(self.prompt_len);
        (prompt, completion, &mut self.payload)
    }

    /// Number of tokens whose keys and values are in the blocks.
    pub(crate) fn computed_tokens(&self) -> usize {
        self.computed_tokens
    }

    /// Numbers of the sequence's blocks, in token order.
    pub(crate) fn block_table(&self) -> &[u32] {
        &self.block_table
    }

    /// Number of prompt tokens from the prefix cache.
    pub(crate) fn cached_tokens(&self) -> usize {
        self.cached_tokens.unwrap_or(0)
    }

    /// Returns the next `rows` tokens to compute.
    pub(crate) fn next_tokens(&self, rows: usize) -> &[u32] {
        &self.tokens[self.computed_tokens..self.computed_tokens + rows]
    }

    /// Number of tokens that are not computed yet.
    pub(crate) fn pending_tokens(&self) -> usize {
        self.tokens.len() - self.computed_tokens
    }
}

/// All sequences of the engine with their blocks.
#[derive(Debug)]
pub(crate) struct Scheduler<T> {
    blocks: BlockAllocator,
    limits: StepLimits,
    waiting: VecDeque<Sequence<T>>,
    /// Running sequences, oldest first.
    running: Vec<Sequence<T>>,
    preempted: u64,
}

impl<T> Scheduler<T> {
    pub(crate) fn new(blocks: BlockAllocator, limits: StepLimits) -> Self {
        Self { blocks, limits, waiting: VecDeque::new(), running: Vec::new(), preempted: 0 }
    }

    /// Adds a sequence to the waiting list. Prompt and `max_tokens` together must fit into the blocks.
    pub(crate) fn add(&mut self, prompt: Vec<u32>, sharing: bool, payload: T) {
        let mut keys = Vec::with_capacity(prompt.len() / self.blocks.block_tokens());
        for block in prompt.chunks_exact(self.blocks.block_tokens()) {
            keys.push(BlockHash::chained(keys.last().copied(), block));
        }
        let (length, table) = (prompt.len(), Vec::new());
        self.waiting.push_back(Sequence {
            tokens: prompt,
            prompt_len: length,
            computed_tokens: 0,
            block_table: table,
            block_hashes: keys,
            use_prefix_cache: sharing,
            cached_tokens: None,
            payload,
        });
    }

    pub(crate) fn running(&mut self) -> &mut [Sequence<T>] {
        &mut self.running
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Payloads of the waiting sequences; none of these has blocks.
    pub(crate) fn waiting_payloads(&mut self) -> impl Iterator<Item = &mut T> {
        self.waiting.iter_mut().map(|sequence| &mut sequence.payload)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Number of preemptions since the start.
    pub(crate) fn preemptions(&self) -> u64 {
        self.preempted
    }

    /// Returns the number of blocks in use and of all blocks.
    pub(crate) fn block_usage(&self) -> (usize, usize) {
        (self.blocks.block_count() - self.blocks.free_count(), self.blocks.block_count())
    }

    /// Keeps the sequences for which `wanted` returns true and releases the blocks of the others.
    pub(crate) fn retain(&mut self, wanted: impl Fn(&Sequence<T>) -> bool) {
        self.waiting.retain(|sequence| wanted(sequence));
        let blocks = &mut self.blocks;
        self.running.retain(|sequence| {
            let wanted = wanted(sequence);
            if !wanted {
                blocks.release(&sequence.block_table);
            }
            wanted
        });
    }

    /// Empties the prefix cache.
    pub(crate) fn invalidate_prefix_cache(&mut self) {
        self.blocks.clear_prefix_cache();
    }

    /// Removes all sequences and returns their payloads.
    pub(crate) fn drain(&mut self) -> Vec<T> {
        for sequence in &self.running {
            self.blocks.release(&sequence.block_table);
        }
        self.running.drain(..).chain(self.waiting.drain(..)).map(|sequence| sequence.payload).collect()
    }

    /// Plans the next step. Returns the number of tokens to compute for each running sequence, in order; 0
    /// skips the sequence. All blocks of the step are allocated on return.
    pub(crate) fn schedule_step(&mut self) -> Vec<usize> {
        self.allocate_decode_blocks();
        self.start_waiting_sequences();
        let mut rows: Vec<usize> =
            self.running.iter().map(|sequence| usize::from(sequence.pending_tokens() == 1)).collect();
        let writing: usize = rows.iter().sum();
        // Prompts advance by at least one block per step, however many sequences decode.
        let mut budget = self.limits.rows.saturating_sub(writing).max(self.blocks.block_tokens());
        let mut prompts: Vec<usize> =
            (0..rows.len()).filter(|&at| self.running[at].pending_tokens() > 1).collect();
        prompts.sort_by_key(|&at| self.running[at].pending_tokens());
        for (done, &at) in prompts.iter().enumerate() {
            let share = budget.div_ceil(prompts.len() - done);
            rows[at] = self.running[at].pending_tokens().min(share);
            budget -= rows[at];
        }
        rows
    }

    /// Allocates the block that each decoding sequence needs for its next token, oldest first. Preempts the
    /// youngest sequence while no block is free.
    fn allocate_decode_blocks(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &self.running[at];
            if sequence.tokens.len() <= sequence.block_table.len() * self.blocks.block_tokens() {
                at += 1;
            } else if let Some(block) = self.blocks.allocate(1) {
                self.running[at].block_table.extend(block);
                at += 1;
            } else if let Some(mut youngest) = self.running.pop() {
                self.blocks.release(&youngest.block_table);
                youngest.block_table.clear();
                youngest.computed_tokens = 0;
                self.waiting.push_front(youngest);
                self.preempted += 1;
            }
        }
    }

    /// Starts waiting sequences in order while blocks are free and the limit permits.
    fn start_waiting_sequences(&mut self) {
        let size = self.blocks.block_tokens();
        let mut computing: HashSet<BlockHash> = HashSet::new();
        for sequence in self.running.iter().filter(|sequence| sequence.pending_tokens() > 1) {
            computing.extend(&sequence.block_hashes[sequence.computed_tokens / size..]);
        }
        let mut at = 0;
        while at < self.waiting.len() && self.running.len() < self.limits.running {
            let next = &self.waiting[at];
            // The last token is always computed, because the blocks hold no hidden state for the next
            // token.
            let keys = &next.block_hashes[..next.block_hashes.len().min((next.tokens.len() - 1) / size)];
            let (shared, unused) =
                if next.use_prefix_cache { self.blocks.cached_prefix(keys) } else { (0, 0) };
            if next.use_prefix_cache && keys.get(shared).is_some_and(|key| computing.contains(key)) {
                at += 1;
                continue;
            }
            let needed = next.tokens.len().div_ceil(size) - shared;
            // One spare block per running sequence; otherwise the next step would preempt a sequence.
            let spare = if self.running.is_empty() { 0 } else { self.running.len() + 1 };
            if self.blocks.free_count() < needed + unused + spare {
                return;
            }
            let Some(mut sequence) = self.waiting.remove(at) else { return };
            sequence.block_table = self.blocks.acquire_cached(&sequence.block_hashes[..shared]);
            sequence.block_table.extend(self.blocks.allocate(needed).unwrap_or_default());
            sequence.computed_tokens = shared * size;
            sequence.cached_tokens.get_or_insert(sequence.computed_tokens);
            computing.extend(&sequence.block_hashes[shared..]);
            self.running.push(sequence);
        }
    }

    /// Records a step with `rows` computed tokens per running sequence. Full blocks enter the prefix cache.
    pub(crate) fn complete_step(&mut self, rows: &[usize]) {
        let size = self.blocks.block_tokens();
        for (sequence, rows) in self.running.iter_mut().zip(rows) {
            let full = sequence.computed_tokens / size;
            sequence.computed_tokens += rows;
            for at in full..sequence.computed_tokens / size {
                if at == sequence.block_hashes.len() {
                    let tokens = &sequence.tokens[at * size..(at + 1) * size];
                    sequence
                        .block_hashes
                        .push(BlockHash::chained(sequence.block_hashes.last().copied(), tokens));
                }
                self.blocks.register_full_block(sequence.block_table[at], sequence.block_hashes[at]);
            }
        }
    }

    /// Appends `token` to the running sequence at index `at`.
    pub(crate) fn append_token(&mut self, at: usize, token: u32) {
        self.running[at].tokens.push(token);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A toy model: the next token is a hash of all tokens before. Every slot of every block holds the hash
    /// computed there.
    struct Toy {
        schedule: Scheduler<usize>,
        /// Hash of a token and all tokens before, by block and slot.
        slots: Vec<Vec<u64>>,
        done: Vec<Option<Vec<u32>>>,
        rows: usize,
    }

    fn after(before: u64, token: u32) -> u64 {
        before.wrapping_mul(31).wrapping_add(u64::from(token) + 1)
    }

    const END: usize = 9;

    impl Toy {
        fn new(blocks: usize, limits: StepLimits) -> Self {
            let schedule = Scheduler::new(BlockAllocator::new(4, blocks), limits);
            Self { schedule, slots: vec![vec![0; 4]; blocks], done: Vec::new(), rows: 0 }
        }

        fn add(&mut self, prompt: Vec<u32>) {
            self.schedule.add(prompt, true, self.done.len());
            self.done.push(None);
        }

        fn step(&mut self) {
            let rows = self.schedule.schedule_step();
            let mut next = Vec::new();
            for (sequence, &rows) in self.schedule.running().iter().zip(&rows) {
                self.rows += rows;
                for (offset, &token) in sequence.next_tokens(rows).iter().enumerate() {
                    let at = sequence.computed_tokens() + offset;
                    let slot = |at: usize| (sequence.block_table()[at / 4] as usize, at % 4);
                    let before = if at == 0 {
                        0
                    } else {
                        let (block, place) = slot(at - 1);
                        self.slots[block][place]
                    };
                    let (block, place) = slot(at);
                    self.slots[block][place] = after(before, token);
                }
                if rows == 0 {
                    next.push(0);
                    continue;
                }
                let end = sequence.computed_tokens() + rows;
                let (block, place) = (sequence.block_table()[(end - 1) / 4] as usize, (end - 1) % 4);
                next.push((self.slots[block][place] % 5) as u32);
            }
            assert!(rows.iter().any(|rows| *rows > 0), "a step must compute something");
            self.schedule.complete_step(&rows);
            for (at, token) in next.into_iter().enumerate() {
                if rows[at] > 0 && self.schedule.running()[at].pending_tokens() == 0 {
                    self.schedule.append_token(at, token);
                }
            }
            for sequence in self.schedule.running() {
                if sequence.completion().len() == END {
                    self.done[sequence.payload] = Some(sequence.completion().to_vec());
                }
            }
            self.schedule.retain(|sequence| sequence.completion().len() < END);
        }
    }

    /// Returns the completion of `prompt` decoded alone.
    fn alone(prompt: &[u32]) -> Vec<u32> {
        let mut state = prompt.iter().fold(0, |state, token| after(state, *token));
        (0..END)
            .map(|_| {
                let token = (state % 5) as u32;
                state = after(state, token);
                token
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// With any arrivals, prefix sharing, waiting and preemption, each completion equals the completion
        /// decoded alone. All blocks are free at the end.
        #[test]
        fn batched_sequences_match_single_sequences(
            prompts in prop::collection::vec(prop::collection::vec(0u32..2, 1..20), 1..14),
            blocks in 8usize..30, running in 1usize..6, rows in 1usize..24, pace in 0usize..4, leaves in 0usize..40,
        ) {
            let mut toy = Toy::new(blocks, StepLimits { running, rows });
            let mut arriving = prompts.clone().into_iter();
            let (mut steps, mut left) = (0, None);
            for prompt in arriving.by_ref().take(3) {
                toy.add(prompt);
            }
            while !toy.schedule.is_empty() || arriving.len() > 0 {
                if steps % (pace + 1) == 0 && let Some(prompt) = arriving.next() {
                    toy.add(prompt);
                }
                if steps == leaves {
                    left = Some(0);
                    toy.schedule.retain(|sequence| sequence.payload != 0);
                }
                steps += 1;
                prop_assert!(steps < 3000, "it never ends");
                if !toy.schedule.is_empty() { toy.step() }
            }
            prop_assert_eq!(toy.schedule.block_usage().0, 0);
            for (at, prompt) in prompts.iter().enumerate() {
                match &toy.done[at] {
                    Some(done) => prop_assert_eq!(done, &alone(prompt)),
                    None => prop_assert_eq!(left, Some(at)),
                }
            }
        }
    }

    #[test]
    fn completions_of_one_prompt_compute_the_prompt_once() {
        let mut toy = Toy::new(200, StepLimits { running: 16, rows: 16 });
        let prompt: Vec<u32> = (0..61).map(|at| at % 3).collect();
        (0..8).for_each(|_| toy.add(prompt.clone()));
        while !toy.schedule.is_empty() {
            toy.step();
        }
        // The 61 prompt rows once. Then for each completion the rows after the last shared full block, and
        // all generated tokens but the last.
        assert_eq!(toy.rows, 61 + 7 + 8 * (END - 1));
        assert!(toy.done.iter().all(|done| done.as_deref() == Some(alone(&prompt).as_slice())));
    }

    #[test]
    fn long_prompts_do_not_delay_short_prompts() {
        let mut schedule = Scheduler::new(BlockAllocator::new(4, 1000), StepLimits { running: 8, rows: 40 });
        schedule.add((0..900).collect(), true, 0);
        schedule.add((2000..2010).collect(), true, 1);
        schedule.add((3000..3010).collect(), true, 2);
        assert_eq!(schedule.schedule_step(), [20, 10, 10]);
    }
}
