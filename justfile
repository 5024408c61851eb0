# Thin names for the commands that CI and the README use.

fmt:
    cargo fmt --all

lint:
    cargo fmt --all --check
    cargo clippy --release --workspace --all-targets --locked -- -D warnings

test:
    cargo test --release --workspace --locked

# The same tests, two at a time, with cargo-nextest.
nextest:
    cargo nextest run --cargo-profile release --workspace --locked --profile ci

demo *ARGS:
    cargo run --release --locked -- demo {{ARGS}}

# Open-loop load on an endpoint, for example: just load --url http://127.0.0.1:8080/v1 --model demo-student
load *ARGS:
    cargo run --release --locked -p load-tests -- load {{ARGS}}

# The gateway beside nginx, Envoy and bare hyper, as far as they are installed; for example: just bench --only plain,paced
bench *ARGS:
    cargo build --profile dist --locked -p potstill-gateway -p load-tests
    target/dist/load-tests bench {{ARGS}}

# The client libraries of tests/tests/clients.rs.
clients:
    tests/clients/setup.sh target/clients
    POTSTILL_CLIENTS=$PWD/target/clients cargo test --release --locked -p system-tests --test clients -- --nocapture

# Every property test with many more cases.
fuzz CASES="100000":
    PROPTEST_CASES={{CASES}} cargo test --release --locked -p potstill-gateway -p potstill-shared -p potstill-data -p potstill-verify --lib

# Every reader of foreign bytes for so many seconds with fresh inputs.
fuzz-bytes SECONDS="60":
    FUZZ_SECONDS={{SECONDS}} cargo test --release --locked -p system-tests --test fuzz -- --nocapture

deny:
    cargo deny check bans licenses sources

# Rewrites tests/fixtures from PyTorch and transformers.
fixtures:
    python3 -m venv .venv && .venv/bin/pip install torch transformers safetensors
    .venv/bin/python tests/fixtures/make_fixtures.py
    .venv/bin/python tests/fixtures/make_algorithms.py

# Trains the demonstration's teacher again, about a quarter of an hour on two cores.
teacher:
    cargo run --release --locked -- run trainer/recipes/demo-teacher.toml

verify: lint test
    cargo run --release --locked -- demo --quick --exit --out target/demo-quick

# Scaling laws on simulated pools, for example: just elastic --only burst --seeds 5
elastic *ARGS:
    cargo run --release --locked -p load-tests -- elastic {{ARGS}}

# Answer verification beside Math-Verify, which must be installed in the Python that is named.
bench-verify PYTHON="python3":
    cargo build --release --locked
    {{PYTHON}} load-tests/peers/verify.py target/release/potstill

# GSM8K by `potstill eval` and by lm-eval at one endpoint; lm-eval must be installed in the Python that is named.
bench-lm-eval PYTHON="python3" *ARGS:
    cargo build --release --locked
    {{PYTHON}} load-tests/peers/lm_eval.py --potstill target/release/potstill {{ARGS}}

# The CoT pipeline with a teacher that answers at once, beside distilabel or curator where the Python that is named has them.
bench-pipeline PYTHON="python3" *ARGS:
    cargo build --release --locked --workspace
    {{PYTHON}} load-tests/peers/pipeline.py {{ARGS}}

# Training steps beside PyTorch and transformers, which must be installed in the Python that is named.
bench-train PYTHON="python3" *ARGS:
    cargo build --release --locked
    {{PYTHON}} load-tests/peers/train.py target/release/potstill {{ARGS}}

# What GRPO's rewards or the order of lessons do, several seeds: just experiment rewards, just experiment curriculum
experiment NAME *ARGS:
    cargo build --release --locked
    python3 load-tests/experiments/training.py target/release/potstill {{NAME}} {{ARGS}}
