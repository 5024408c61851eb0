//! The gateways of a cluster, as they know of each other: through one Lease. Its holder leads: it alone decides and changes
//! workloads. Every gateway notes in an annotation of the Lease what is asked of its pools, what it still holds on pods that
//! drain, and the plans that were declared to it; so the leader decides on the demand of all, and removes no pod on
//! which another gateway still has a request. What the leader tells KEDA stands in an annotation of its own, which outlives it.
//!
//! ```text
//! gateway.potstill.dev/NAME   what that gateway has to say        Report
//! potstill.dev/said           what KEDA is told, by model         {model: Word}
//! ```
//!
//! Clocks of other machines are not trusted: a holder is gone when the Lease has not changed for its duration as measured
//! here, as in client-go.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Config, Error};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{Notify, OnceCell};

use crate::autoscale::plans::SharedPlan;
use crate::autoscale::policy::Windows;
use crate::config::{Actuator, PoolConfig};
use crate::gateway::Shared;

/// One call of the API server may take so long.
pub(super) const CALL: Duration = Duration::from_secs(10);
/// Tries of a change that somebody else's change got ahead of.
const TRIES: usize = 4;
/// The annotation of what is told to KEDA.
const SAID: &str = "potstill.dev/said";
/// Before the name of a gateway in the Lease's annotations.
const PREFIX: &str = "gateway.potstill.dev/";
/// Longest name of an annotation after its prefix.
const NAME: usize = 63;

/// What a gateway lets the others know of one pool.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PoolReport {
    /// Its own requests on nodes.
    pub(crate) active: usize,
    /// Its own requests that wait.
    pub(crate) queued: usize,
    /// Its own arrivals.
    pub(crate) arrivals: Windows,
    /// Its own completions in the last minute.
    pub(crate) departed_60: u64,
    /// Requests that it holds in each drain that it knows of.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) held: BTreeMap<String, usize>,
}

impl PoolReport {
    /// What two scalers of one gateway say of one model: the pool of a configuration from before may still write.
    fn with(&self, other: &Self) -> Self {
        let both = |(drain, held): (&String, &usize)| Some((drain.clone(), held + other.held.get(drain)?));
        Self {
            active: self.active + other.active,
            queued: self.queued + other.queued,
            arrivals: self.arrivals + other.arrivals,
            departed_60: self.departed_60 + other.departed_60,
            held: self.held.iter().filter_map(both).collect(),
        }
    }
}

/// What KEDA is told of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Word {
    /// The workload that it is said of.
    pub(crate) workload: String,
    /// Pods that there should be.
    pub(crate) replicas: usize,
    /// The lowest number that was said and may yet be acted on: no more pods may work.
    pub(crate) floor: usize,
}

/// What a gateway lets the others know.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Counts up, so that a gateway that is alive always changes something.
    n: u64,
    pub(crate) pools: BTreeMap<String, PoolReport>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) plans: Vec<SharedPlan>,
}

/// What stands in the Lease of what KEDA is told.
fn said_in(lease: &Lease) -> BTreeMap<String, Word> {
    let text = lease.metadata.annotations.as_ref().and_then(|notes| notes.get(SAID));
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// What is known of the Lease, and since when.
#[derive(Default)]
struct Known {
    holder: String,
    /// Holder, time of renewal and number of transitions as they stood when last they changed, and when that was.
    renewal: Option<(String, Instant)>,
    others: BTreeMap<String, (Report, Instant)>,
    own: Report,
    /// What each scaler of this gateway says of its model; `own` has the sums.
    parts: BTreeMap<String, BTreeMap<u64, PoolReport>>,
    /// The scalers whose words are being written, and those whose words stand in the Lease.
    offered: BTreeSet<u64>,
    standing: BTreeSet<u64>,
    /// What this gateway says as the leader.
    words: BTreeMap<String, Word>,
    /// What KEDA is told, as it stands in the Lease.
    said: BTreeMap<String, Word>,
    /// When the last reading of the Lease began that brought news.
    read_at: Option<Instant>,
    /// Until when this gateway leads, unless it renews before.
    leads_until: Option<Instant>,
}

/// The gateways of this cluster.
pub(crate) struct Cluster {
    /// This gateway.
    pub(crate) name: String,
    client: OnceCell<(Client, String)>,
    known: Mutex<Known>,
    running: AtomicBool,
    next_part: AtomicU64,
    /// Told when the others should hear something before the next round.
    soon: Notify,
}

impl Default for Cluster {
    fn default() -> Self {
        // In a cluster the name of the pod, which the downward API gives.
        let name =
            std::env::var("POD_NAME").unwrap_or_else(|_| potstill_shared::id::unique("potstill-gateway"));
        Self {
            name: name[name.len().saturating_sub(NAME)..].trim_matches(['-', '.']).to_owned(),
            client: OnceCell::new(),
            known: Mutex::default(),
            running: AtomicBool::new(false),
            next_part: AtomicU64::new(0),
            soon: Notify::new(),
        }
    }
}

impl Cluster {
    /// Innermost of the autoscaler's locks: [`observe`](crate::autoscale::observe::observe) asks with those of pools and plans
    /// held, so none of them may be taken under this one.
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client of the API server and the namespace that it is used in: from `KUBECONFIG` or `~/.kube/config`, else
    /// those that a pod has.
    pub(super) async fn client(&self) -> Result<(Client, String), String> {
        let connect = async || {
            let mut config = Config::infer().await.map_err(|error| {
                format!("there is neither a kubeconfig nor the service account of a pod: {error}")
            })?;
            config.connect_timeout = Some(CALL);
            let namespace = config.default_namespace.clone();
            let client = Client::try_from(config).map_err(|error| error.to_string())?;
            Ok::<_, String>((client, namespace))
        };
        self.client.get_or_try_init(connect).await.cloned()
    }

    /// Whether this gateway decides for all.
    pub(crate) fn leads(&self) -> bool {
        self.leads_now(&self.known())
    }

    fn leads_now(&self, known: &Known) -> bool {
        known.leads_until.is_some_and(|until| Instant::now() < until)
    }

    /// Who decides; empty before one was found.
    pub(crate) fn leader(&self) -> String {
        self.known().holder.clone()
    }

    /// What the other gateways of the last rounds say of `model`.
    pub(crate) fn others(&self, model: &str) -> Vec<PoolReport> {
        let known = self.known();
        known.others.values().filter_map(|(report, _)| report.pools.get(model).cloned()).collect()
    }

    /// A scaler that has something to say.
    pub(super) fn part(&self) -> u64 {
        self.next_part.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether the others know of this scaler, so that a leader waits for its word before a pod goes.
    pub(super) fn stands(&self, part: u64) -> bool {
        self.known().standing.contains(&part)
    }

    /// Whether all others know of the drain, which was there `since` then, and hold nothing on the pod.
    pub(super) fn left(&self, model: &str, part: u64, drain: &str, since: Instant) -> bool {
        let known = self.known();
        let left = |pool: &PoolReport| pool.held.get(drain) == Some(&0);
        // One that is not heard of yet looks at the pods only after its word stands, and finds the drain.
        known.read_at.is_some_and(|read| read > since)
            && known.others.values().all(|(report, _)| report.pools.get(model).is_none_or(left))
            && known
                .parts
                .get(model)
                .is_none_or(|parts| parts.iter().all(|(of, pool)| *of == part || left(pool)))
    }

    /// What KEDA is told of `model`, as far as it is known here.
    pub(crate) fn word(&self, model: &str) -> Option<Word> {
        self.known().said.get(model).cloned()
    }

    /// The same as it stands in the Lease now, so that whoever asks one gateway after the other hears no number that was before
    /// the last.
    pub(crate) async fn word_now(&self, shared: &Shared, model: &str) -> Result<Option<Word>, String> {
        let (client, namespace) = self.client().await?;
        let leases: Api<Lease> = Api::namespaced(client, &namespace);
        let lease = shared.live().config.autoscale.lease.clone();
        let found = call(leases.get_opt(&lease)).await.map_err(|error| told(&error))?;
        Ok(found.and_then(|found| said_in(&found).remove(model)))
    }

    /// Says something to KEDA, as the leader; soon if it is news.
    pub(super) fn say(&self, model: &str, word: Word) {
        let before = self.known().words.insert(model.to_owned(), word.clone());
        if before != Some(word) {
            self.soon.notify_one();
        }
    }

    /// Takes what one scaler of this gateway has to say of `model`. Pods that begin or end to be held are told soon.
    pub(super) fn report(&self, model: &str, part: u64, report: PoolReport) {
        let mut known = self.known();
        let parts = known.parts.entry(model.to_owned()).or_default();
        let first = parts.insert(part, report).is_none();
        let sum = parts.values().cloned().reduce(|sum, part| sum.with(&part)).unwrap_or_default();
        let free = |report: &PoolReport| -> Vec<_> {
            report.held.iter().map(|(drain, held)| (drain.clone(), *held == 0)).collect()
        };
        let news = free(&sum);
        let before = known.own.pools.insert(model.to_owned(), sum);
        if first || before.is_none_or(|before| free(&before) != news) {
            self.soon.notify_one();
        }
    }

    /// Forgets a scaler that is gone.
    pub(super) fn forget(&self, model: &str, part: u64) {
        let mut known = self.known();
        let Some(parts) = known.parts.get_mut(model) else { return };
        parts.remove(&part);
        match parts.values().cloned().reduce(|sum, part| sum.with(&part)) {
            Some(sum) => drop(known.own.pools.insert(model.to_owned(), sum)),
            None => {
                known.parts.remove(model);
                known.own.pools.remove(model);
            }
        }
    }

    /// Takes part, from the first pool on, until the gateway ends; then lets go of the Lease.
    pub(crate) fn take_part(self: &Arc<Self>, shared: &Arc<Shared>) {
        if !self.running.swap(true, Ordering::Relaxed) {
            shared.tasks.spawn(Arc::clone(self).run(Arc::clone(shared)));
        }
    }

    async fn run(self: Arc<Self>, shared: Arc<Shared>) {
        let mut last = None;
        loop {
            let autoscale = shared.live().config.autoscale.clone();
            let duration = Duration::from_secs(autoscale.lease_s.max(1));
            let ending = shared.ended();
            let outcome = self.round(&shared, &autoscale.lease, duration, ending).await;
            if ending {
                return;
            }
            // The same trouble is told once.
            let problem = outcome.err();
            if problem != last
                && let Some(problem) = &problem
            {
                tracing::warn!(lease = autoscale.lease, problem, "the gateways of this cluster cannot agree");
            }
            last = problem;
            let pause = duration / 5;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.soon.notified() => tokio::time::sleep(pause.min(Duration::from_millis(200))).await,
                () = shared.until_end() => {}
            }
        }
    }

    /// Reads the Lease and writes this gateway's part of it; `ending` takes it out.
    async fn round(
        &self,
        shared: &Shared,
        lease: &str,
        duration: Duration,
        ending: bool,
    ) -> Result<(), String> {
        let (client, namespace) = self.client().await?;
        let leases: Api<Lease> = Api::namespaced(client, &namespace);
        let mut last = String::new();
        for _ in 0..TRIES {
            let begun = Instant::now();
            let found = match call(leases.get_opt(lease)).await {
                Ok(Some(found)) => found,
                Ok(None) if ending => return Ok(()),
                Ok(None) => {
                    let new = json!({"metadata": {"name": lease}, "spec": {}});
                    let new: Lease = serde_json::from_value(new).map_err(|error| error.to_string())?;
                    match call(leases.create(&PostParams::default(), &new)).await {
                        Ok(created) => created,
                        // Another gateway was quicker.
                        Err(error) if is(&error, 409) => continue,
                        Err(error) => return Err(told(&error)),
                    }
                }
                Err(error) => return Err(told(&error)),
            };
            let plans = shared.autoscaler.plans().export(shared.autoscaler.now());
            // KEDA is told of a pool as long as it changes the number.
            let by_keda = |model: &str| shared.pool(model).is_some_and(|pool| keda_scales(&pool.config()));
            let leaving = ending || shared.stopping();
            let patch = self.answer(&found, plans, duration, (leaving, ending), by_keda);
            match call(leases.patch(lease, &PatchParams::default(), &Patch::Merge(&patch))).await {
                Ok(written) => {
                    self.follow(shared, &written, begun, duration);
                    return Ok(());
                }
                Err(error) if is(&error, 409) => last = told(&error),
                Err(error) => return Err(told(&error)),
            }
        }
        Err(format!("others kept changing the Lease: {last}"))
    }

    /// What this gateway writes into the Lease as it was `found`. One that is `leaving` leads no longer, but says what it still
    /// holds until it is `ending`.
    fn answer(
        &self,
        found: &Lease,
        plans: Vec<SharedPlan>,
        duration: Duration,
        (leaving, ending): (bool, bool),
        by_keda: impl Fn(&str) -> bool,
    ) -> Value {
        let spec = found.spec.clone().unwrap_or_default();
        let mut known = self.known();
        let holder = spec.holder_identity.unwrap_or_default();
        let stamp = format!("{holder} {:?} {:?}", spec.renew_time, spec.lease_transitions);
        if known.renewal.as_ref().is_none_or(|(seen, _)| *seen != stamp) {
            known.renewal = Some((stamp, Instant::now()));
        }
        let unchanged = known.renewal.as_ref().map_or(Duration::ZERO, |(_, since)| since.elapsed());
        let theirs = Duration::from_secs(spec.lease_duration_seconds.unwrap_or(0).max(1) as u64);
        let leads = holder == self.name;
        let takes = !leaving && (holder.is_empty() || (!leads && unchanged > theirs));
        // The others' words, and for how long they have stood. One that could not look itself knows nothing of that.
        let blind = known.read_at.is_none_or(|at| at.elapsed() > duration);
        let notes = found.metadata.annotations.clone().unwrap_or_default();
        let mut others = BTreeMap::new();
        for (key, text) in &notes {
            let Some(name) = key.strip_prefix(PREFIX).filter(|name| *name != self.name) else { continue };
            let report: Report = serde_json::from_str(text).unwrap_or_default();
            let since = match known.others.get(name) {
                Some((before, since)) if *before == report && !blind => *since,
                _ => Instant::now(),
            };
            others.insert(name.to_owned(), (report, since));
        }
        let stale = |since: &Instant| since.elapsed() > duration * 2;
        let gone: Vec<String> =
            others.iter().filter(|(_, (_, since))| stale(since)).map(|(name, _)| name.clone()).collect();
        others.retain(|_, (_, since)| !stale(since));
        known.others = others;
        known.own.n += 1;
        known.own.plans = plans;
        known.offered = known.parts.values().flat_map(BTreeMap::keys).copied().collect();
        let mut annotations = serde_json::Map::new();
        let own = if ending { Value::Null } else { json!(json!(known.own).to_string()) };
        annotations.insert(format!("{PREFIX}{}", self.name), own);
        let mut said = said_in(found);
        known.words.retain(|model, _| by_keda(model));
        if leads {
            said.extend(known.words.clone());
            said.retain(|model, _| by_keda(model));
        } else {
            // What was said when this gateway led before is not said again.
            known.words.clear();
        }
        if leads && said != said_in(found) {
            annotations.insert(SAID.to_owned(), json!(json!(said).to_string()));
        }
        if leads || takes {
            annotations.extend(gone.iter().map(|name| (format!("{PREFIX}{name}"), Value::Null)));
        }
        let now = MicroTime(Timestamp::now());
        if leaving {
            known.leads_until = None;
        }
        let spec = match (leaving, leads, takes) {
            (true, true, _) => json!({"holderIdentity": ""}),
            (false, true, _) => json!({"renewTime": now, "leaseDurationSeconds": duration.as_secs()}),
            (_, _, true) => json!({
                "holderIdentity": self.name, "acquireTime": now, "renewTime": now,
                "leaseDurationSeconds": duration.as_secs(),
                "leaseTransitions": spec.lease_transitions.unwrap_or(0) + 1,
            }),
            _ => json!({}),
        };
        json!({
            "metadata": {"resourceVersion": found.metadata.resource_version, "annotations": annotations},
            "spec": spec,
        })
    }

    /// Takes over what was written.
    fn follow(&self, shared: &Shared, written: &Lease, begun: Instant, duration: Duration) {
        let holder = written.spec.as_ref().and_then(|spec| spec.holder_identity.clone()).unwrap_or_default();
        let (plans, changed) = {
            let mut known = self.known();
            known.standing = std::mem::take(&mut known.offered);
            known.said = said_in(written);
            known.read_at = Some(begun);
            // Sooner over than the Lease, so that no two lead at once.
            known.leads_until = (holder == self.name).then(|| begun + duration * 2 / 3);
            let plans: Vec<_> = known
                .others
                .iter()
                .map(|(name, (report, since))| {
                    (name.clone(), report.plans.clone(), since.elapsed().as_secs_f64())
                })
                .collect();
            (plans, std::mem::replace(&mut known.holder, holder.clone()) != holder)
        };
        if changed {
            tracing::info!(leader = holder, gateway = self.name, "the leader of the gateways changed");
        }
        shared.metrics.leader.set(i64::from(holder == self.name));
        let now = shared.autoscaler.now();
        shared.autoscaler.plans().import(now, &plans, |model, stage| shared.finished(model, stage));
        if changed {
            shared.autoscaler.wake();
        }
    }
}

/// Whether KEDA changes the number of this pool's pods.
fn keda_scales(config: &PoolConfig) -> bool {
    let kubernetes = config.scale.as_ref().and_then(|scale| scale.kubernetes.as_ref());
    kubernetes.is_some_and(|kubernetes| kubernetes.actuator == Actuator::Keda)
}

/// A call with a bound on its time.
pub(super) async fn call<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(CALL, call).await.unwrap_or_else(|_| {
        Err(Error::Service(format!("the API server did not answer within {} s", CALL.as_secs()).into()))
    })
}

/// Whether the API server answered with this status.
pub(super) fn is(error: &Error, code: u16) -> bool {
    matches!(error, Error::Api(status) if status.code == code)
}

/// An error as one line for the log, with what can be done about it.
pub(super) fn told(error: &Error) -> String {
    match error {
        Error::Api(status) if status.code == 403 => {
            format!("{}; k8s/base/rbac.yaml has the rights that the gateway needs", status.message)
        }
        Error::Api(status) => format!("{} ({})", status.message, status.code),
        other => other.to_string(),
    }
}
