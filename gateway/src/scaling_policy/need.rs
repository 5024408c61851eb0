//! What one pool needs, before the budget applies.

/// Number of nodes that one pool needs, by cause. The largest of the three numbers applies.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct CapacityNeed {
    /// Nodes for unplanned demand.
    pub(super) online: usize,
    /// Nodes for the running stages.
    pub(super) stage: usize,
    /// Warm nodes for stages that begin soon.
    pub(super) warm: usize,
    /// Remaining work of the running stages: node-seconds times cost per node.
    pub(super) work: f64,
    /// Explanation for the admin API and the log.
    pub(super) reason: String,
}

impl CapacityNeed {
    pub(super) fn nodes(&self) -> usize {
        self.online.max(self.stage).max(self.warm)
    }
}
