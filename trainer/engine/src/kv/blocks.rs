//! The block allocator and prefix cache of the KV cache; holds numbers only, no tensors.
//!
//! A block has room for a fixed number of tokens. Sequences share the full blocks of a common prefix. The
//! key of a full block is a hash over all tokens up to its end, so equal keys mean equal content. An unused
//! block keeps its content until the space is needed. Eviction takes the block unused for longest, and of
//! one sequence the end before the beginning (as in vLLM, arXiv:2309.06180).

use std::collections::{BTreeSet, HashMap};

/// Hash over the tokens of a block and of all blocks before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct BlockHash([u8; 16]);

impl BlockHash {
    /// Returns the key of a block with `tokens` after the block `parent`. The hash is
    /// cryptographic, so no prompt can be crafted to hit the blocks of another.
    pub(crate) fn chained(parent: Option<Self>, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&parent.map_or([0; 16], |parent| parent.0));
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        let mut key = [0; 16];
        key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(key)
    }
}

#[derive(Debug, Default)]
struct Block {
    /// Number of sequences that use the block.
    ref_count: u32,
    /// Key in the prefix cache, if the block is registered.
    hash: Option<BlockHash>,
    /// Logical time of the last release; 0 if the block holds no reusable content.
    released_at: u64,
}

/// All blocks of a cache.
#[derive(Debug)]
pub(crate) struct BlockAllocator {
    size: usize,
    blocks: Vec<Block>,
    /// Unused blocks as `(freed, block)`, next to evict first.
    free: BTreeSet<(u64, u32)>,
    by_key: HashMap<BlockHash, u32>,
    /// Logical clock: counts releases.
    clock: u64,
}

impl BlockAllocator {
    /// Creates `count` unused blocks of `size` tokens.
    pub(crate) fn new(size: usize, count: usize) -> Self {
        let blocks = (0..count).map(|_| Block::default()).collect();
        let free = (0..count as u32).map(|block| (0, block)).collect();
        Self { size, blocks, free, by_key: HashMap::new(), clock: 0 }
    }

    /// Tokens per block.
    pub(crate) fn block_tokens(&self) -> usize {
        self.size
    }

    /// Number of all blocks.
    pub(crate) fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// Number of unused blocks.
    pub(crate) fn free_count(&self) -> usize {
        self.free.len()
    }

    /// Returns how many of the first `keys` are in the prefix cache, and how many of these blocks are
    /// unused. Sharing unused blocks reduces the free ones.
    pub(crate) fn cached_prefix(&self, keys: &[BlockHash]) -> (usize, usize) {
        let found = keys.iter().map_while(|key| self.by_key.get(key));
        found.fold((0, 0), |(all, unused), block| {
            (all + 1, unused + usize::from(self.blocks[*block as usize].ref_count == 0))
        })
    }

    /// Adds a user to the blocks of `keys` and returns them. All keys must be in the prefix cache.
    pub(crate) fn acquire_cached(&mut self, keys: &[BlockHash]) -> Vec<u32> {
        let found: Vec<u32> = keys.iter().map_while(|key| self.by_key.get(key)).copied().collect();
        debug_assert_eq!(found.len(), keys.len());
        for &block in &found {
            let entry = &mut self.blocks[block as usize];
            if entry.ref_count == 0 {
                self.free.remove(&(entry.released_at, block));
            }
            entry.ref_count += 1;
        }
        found
    }

    /// Takes `count` unused blocks and drops their content. Returns `None` if fewer are free.
    pub(crate) fn allocate(&mut self, count: usize) -> Option<Vec<u32>> {
        if self.free.len() < count {
            return None;
        }
        let taken = (0..count).filter_map(|_| self.free.pop_first()).map(|(_, block)| block);
        let taken: Vec<u32> = taken.collect();
        for &block in &taken {
            let entry = &mut self.blocks[block as usize];
            entry.ref_count = 1;
            if let Some(key) = entry.hash.take() {
                self.by_key.remove(&key);
            }
        }
        Some(taken)
    }

    /// Registers a full block in the prefix cache. If the key is registered already, the earlier block
    /// stays.
    pub(crate) fn register_full_block(&mut self, block: u32, key: BlockHash) {
        if let std::collections::hash_map::Entry::Vacant(vacant) = self.by_key.entry(key) {
            vacant.insert(block);
            self.blocks[block as usize].hash = Some(key);
        }
    }

    /// Empties the prefix cache. Blocks in use keep their users.
    pub(crate) fn clear_prefix_cache(&mut self) {
        self.by_key.clear();
        self.free.clear();
        for (entry, number) in self.blocks.iter_mut().zip(0..) {
            (entry.hash, entry.released_at) = (None, 0);
            if entry.ref_count == 0 {
                self.free.insert((0, number));
            }
        }
    }

    /// Removes one user from each block of a sequence, last block first.
    pub(crate) fn release(&mut self, table: &[u32]) {
        for &block in table.iter().rev() {
            let entry = &mut self.blocks[block as usize];
            entry.ref_count -= 1;
            if entry.ref_count == 0 {
                self.clock += 1;
                entry.released_at = if entry.hash.is_some() { self.clock } else { 0 };
                self.free.insert((entry.released_at, block));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chain(tokens: &[u32]) -> Vec<BlockHash> {
        let mut keys = Vec::new();
        for chunk in tokens.chunks_exact(2) {
            keys.push(BlockHash::chained(keys.last().copied(), chunk));
        }
        keys
    }

    #[test]
    fn keys_depend_on_all_previous_tokens() {
        assert_eq!(chain(&[1, 2, 3, 4])[..1], chain(&[1, 2, 9, 9])[..1]);
        assert_ne!(chain(&[1, 2, 3, 4])[1], chain(&[0, 2, 3, 4])[1]);
        assert_ne!(chain(&[1, 2])[0], chain(&[1, 2, 1, 2])[1]);
    }

    #[test]
    fn evicts_the_last_block_of_a_sequence_first() {
        let mut blocks = BlockAllocator::new(2, 3);
        let keys = chain(&[1, 2, 3, 4, 5, 6]);
        let table = blocks.allocate(3).unwrap();
        table.iter().zip(&keys).for_each(|(block, key)| blocks.register_full_block(*block, *key));
        blocks.release(&table);
        assert_eq!(blocks.cached_prefix(&keys), (3, 3));
        let one = blocks.allocate(1).unwrap();
        assert_eq!((blocks.cached_prefix(&keys), one), ((2, 2), vec![table[2]]));
    }

    proptest! {
        /// After any series of allocations and releases the user counts match the tables. Sequences share a
        /// block only with equal tokens.
        #[test]
        fn user_counts_match_the_block_tables(steps in prop::collection::vec((0usize..4, prop::collection::vec(0u32..3, 2..9)), 1..80)) {
            let mut blocks = BlockAllocator::new(2, 12);
            let mut held: Vec<(Vec<u32>, Vec<u32>)> = Vec::new();
            for (what, tokens) in steps {
                if what == 0 && !held.is_empty() {
                    let (_, table) = held.swap_remove(tokens.len() % held.len());
                    blocks.release(&table);
                } else {
                    let keys = chain(&tokens);
                    let (shared, unused) = blocks.cached_prefix(&keys);
                    let needed = tokens.len().div_ceil(2) - shared;
                    if blocks.free_count() - unused >= needed {
                        let mut table = blocks.acquire_cached(&keys[..shared]);
                        table.extend(blocks.allocate(needed).unwrap());
                        for (block, key) in table.iter().zip(&keys) {
                            blocks.register_full_block(*block, *key);
                        }
                        held.push((tokens, table));
                    }
                }
                let mut users = vec![0u32; 12];
                held.iter().flat_map(|(_, table)| table).for_each(|block| users[*block as usize] += 1);
                for (entry, users) in blocks.blocks.iter().zip(&users) {
                    prop_assert_eq!(entry.ref_count, *users);
                }
                prop_assert_eq!(blocks.free_count(), users.iter().filter(|users| **users == 0).count());
                // Two sequences share a block only if all their tokens up to its end are equal.
                for (tokens, table) in &held {
                    for (other, theirs) in &held {
                        for at in 0..table.len().min(theirs.len()) {
                            if table[at] == theirs[at] {
                                let end = ((at + 1) * 2).min(tokens.len());
                                prop_assert_eq!(tokens.get(..end), other.get(..end));
                            }
                        }
                    }
                }
            }
        }
    }
}
