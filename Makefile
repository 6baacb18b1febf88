# Doors only: what each one does is in the script or the cargo command behind it. Everything is built with one
# profile, so that the demonstration, the tests and the virtual machine share one build.
.PHONY: help setup build test check unit it chaos soak sim bugs vm-test install uninstall deb demo bench bench-engine bench-migrate bench-vm clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16
setup: ## install what building and testing need (Debian, as root), and prepare target/vm
	@tests/setup.sh
build: setup ## dstd and dst in target/release
	cargo build --release --workspace --bins --examples
install: ## what was built goes to PREFIX (/usr/local), below DESTDIR: programs, units, manual pages, completions
	@dst-cli/dist/install.sh install
uninstall: ## takes away what install has put there; a configuration that was changed stays
	@dst-cli/dist/install.sh uninstall
deb: build ## a Debian package in target/deb
	@dst-cli/dist/deb.sh
demo: ## everything once, for real: three servers, a striped array, a filesystem on it
	@tests/demo.sh
test: ## all tests; the last line is the sum
	@tests/run.sh
check: ## format, lints, the parts that must build on their own
	@tests/run.sh fmt clippy floors
unit: ## unit and property tests
	cargo test --release --workspace --lib --bins
it: build ## integration tests
	cargo test --release --test it -- --skip chaos::
chaos: build ## real processes that die, and connections that are cut; ROUNDS=n for more
	@tests/run.sh chaos
soak: build ## hours of it: 500 rounds of chaos (ROUNDS=n), 200 migrations (MOVES=n), a million seeds (SEEDS=n), the guest for longer
	@ROUNDS=$${ROUNDS:-500} MOVES=$${MOVES:-200} SEEDS=$${SEEDS:-1000000} RAW=$${RAW:-50} FS=$${FS:-20} SUSPEND=$${SUSPEND:-60} \
	PRESSURE=$${PRESSURE:-600} NEWER=$${NEWER:-10} tests/run.sh chaos moves vm recover newer sim
sim: ## the simulator; SEEDS=n runs so many seeds, SEED=n replays one
	cargo test --release --test sim
bugs: ## plants each mistake of the bank and shows that the simulator notices it; SEEDS=n tries so many seeds
	BUGS=$${BUGS:-1} cargo test --profile bugs --no-default-features --features bugs --test sim
vm-test: ## the tests that need a kernel with ublk, in virtual machines with the oldest and the newest; RAW=n, FS=n, NEWER=n rounds
	@RAW=$${RAW:-5} FS=$${FS:-3} tests/run.sh setup build ublk vm recover newer power
bench: build ## dst against its peers on this machine, in under 15 minutes; QUICK=1 for one, ONLY=server,export,copy,disk,array,idle for parts
	cargo test --release --bench bench -- host
bench-engine: ## the engine alone: time and allocations of a request
	cargo bench --bench engine
bench-migrate: build ## how long a move holds requests up, how fast it copies, what others notice; QUICK=1, ONLY=freeze,copy,foreground,suspend
	cargo test --release --bench bench -- migrate
bench-vm: build ## block devices in a virtual machine, against the kernel's NVMe/TCP and NBD, in about 20 minutes; QUICK=1, WORKS=, PEERS=, ROUNDS=
	cargo test --release --bench bench -- vm
clean: ## forget every build, and the virtual machine
	rm -rf target
