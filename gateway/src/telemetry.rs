//! What the gateway reports about itself: metrics, access log, spans, usage, load recording. Receives plain data and never
//! reaches back into pools or requests.

pub mod access_log;
pub mod load_recording;
pub mod metrics;
pub mod request_summary;
pub mod sinks;
pub mod traces;
pub mod usage;
