//! `SEED=n SHRINK=1`: a smaller plan that breaks the same rule: fewer requests, faults and errors, then the trace of that.

use crate::plan::{Plan, Rates};
use crate::rng::Rng;
use crate::runner;

/// What may be left out of a plan, one thing at a time.
fn candidates(plan: &Plan) -> Vec<Plan> {
    let mut smaller = Vec::new();
    let mut with = |change: &dyn Fn(&mut Plan)| {
        let mut plan = plan.clone();
        change(&mut plan);
        smaller.push(plan);
    };
    for part in [2, 4, 8] {
        if plan.requests > part * 4 {
            with(&|plan| plan.requests -= plan.requests / part);
        }
    }
    for fault in 0..plan.faults.len() {
        with(&|plan| {
            plan.faults.remove(fault);
        });
    }
    let Rates { disk_eio, disk_enospc, sync_eio, damage } = plan.rates;
    if disk_eio > 0 {
        with(&|plan| plan.rates.disk_eio = 0);
    }
    if disk_enospc > 0 {
        with(&|plan| plan.rates.disk_enospc = 0);
    }
    if sync_eio > 0 {
        with(&|plan| plan.rates.sync_eio = 0);
    }
    if damage > 0 {
        with(&|plan| plan.rates.damage = 0);
    }
    if plan.shards > 1 {
        with(&|plan| plan.shards -= 1);
    }
    if plan.depth > 1 {
        with(&|plan| plan.depth /= 2);
    }
    if plan.largest > 1 {
        with(&|plan| plan.largest /= 2);
    }
    if plan.strays {
        with(&|plan| plan.strays = false);
    }
    smaller
}

/// The smallest plan that was found to break the rule that `plan` breaks; `None` if it breaks none.
pub(crate) fn shrink(mut plan: Plan, rng: &Rng) -> Option<Plan> {
    let rule = runner::run_plan(plan.clone(), rng.clone(), false).violation?.rule;
    while let Some(smaller) = candidates(&plan).into_iter().find(|smaller| {
        let outcome = runner::run_plan(smaller.clone(), rng.clone(), false);
        outcome.violation.is_some_and(|violation| violation.rule == rule)
    }) {
        plan = smaller;
    }
    Some(plan)
}
