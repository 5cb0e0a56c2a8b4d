//! Several pipelines beside each other: the data axis of a plan.
//!
//! Devices that are to have the same stage are a *team*, and a team is a device of its own kind: as fast as its members on
//! average, with the memory of the smallest. So the search for one pipeline finds the pipeline of all: over teams, with each
//! replica's part of the microbatches. Every pipeline so found is then taken apart again: each replica gets microbatches in
//! proportion to its speed, the whole is simulated as it will run, sums and updates included, and improved by small changes.

use std::collections::BTreeMap;
use std::ops::Range;

use super::auto::make_schedules;
use super::costs::Prices;
use super::improve::improve;
use super::judge::{Judge, Point, Verdict};
use super::machine::{DeviceProfile, LayerProfile, Link, LinkProfile, Machine, ShapeProfile};
use super::planner::candidate;
use super::search::{Board, allowance, search};
use super::space::{Pool, Space};
use super::start::seconds;
use super::workload::{Batching, Workload};
use super::{Candidate, DataChoice, Options, ScheduleChoice};
use crate::error::Result;
use crate::schedule::{Schedule, generate_chunked};

/// Pipelines over the same teams that are taken apart.
pub(super) const MOST_PIPELINES: usize = 8;
/// Units of work (about 10 ns) for small changes of one plan, and for changes of its shares.
pub(super) const WORK_OF_CHANGES: u64 = 3_000_000;
/// Of the work of the whole search, the part that one over teams takes.
pub(super) const PART: u64 = 6;

/// What each replica does, for its share of the microbatches.
#[derive(Debug, Clone)]
enum Pattern {
    /// The schedule of a name, with so many stages a rank.
    Named(String, usize),
    /// One that was made for the team, for so many microbatches and no other number.
    Made(Schedule),
}

impl Pattern {
    /// For a share; none if there is no such schedule.
    fn schedule(&self, ranks: usize, share: usize) -> Option<Schedule> {
        match self {
            Pattern::Named(name, chunks) => generate_chunked(name, ranks, *chunks, share).ok(),
            Pattern::Made(made) => (made.microbatches == share).then(|| made.clone()),
        }
    }
}

/// Several pipelines before there is a schedule for them.
#[derive(Debug, Clone)]
struct Mesh {
    /// The devices of each replica, in the order of its pipeline.
    replicas: Vec<Vec<usize>>,
    stages: Vec<Range<usize>>,
    schedule: Pattern,
    /// Microbatches of each replica.
    shares: Vec<usize>,
}

/// The best plans found in which every stage has several replicas: of each number of replicas some. None where the options
/// leave none.
///
/// # Errors
///
/// [`Error::Config`](crate::error::Error::Config) for options that contradict one another.
pub(super) fn teams(workload: &Workload, machine: &Machine, options: &Options) -> Result<Vec<Candidate>> {
    let devices = options.devices.as_ref().map_or(machine.devices.len(), Vec::len);
    options.data.check(devices)?;
    let counts = options.data.count().map_or(2..=devices, |count| count..=count);
    let mut found: Vec<Candidate> = Vec::new();
    for count in counts.filter(|&count| count > 1) {
        let groupings = groupings(machine, options.devices.as_deref(), count);
        let part = PART * groupings.len() as u64;
        for teams in groupings {
            for mesh in pipelines(workload, machine, options, &teams, count, part)? {
                found.extend(whole(workload, machine, options, mesh)?);
            }
        }
    }
    Ok(found)
}

/// Ways to put devices into teams of so many: the fastest, those of about the same speed together, or so that the first
/// replica gets the fastest of all.
fn groupings(machine: &Machine, order: Option<&[usize]>, count: usize) -> Vec<Vec<Vec<usize>>> {
    if let Some(order) = order {
        let (stages, rest) = (order.len() / count, order.len() % count);
        let team = |stage: usize| (0..count).map(|replica| order[replica * stages + stage]).collect();
        return if rest == 0 { vec![(0..stages).map(team).collect()] } else { Vec::new() };
    }
    let pool = Pool::new(machine, None);
    let mut devices: Vec<usize> = pool.classes.iter().flatten().copied().collect();
    let speed = |device: &usize| machine.devices[*device].rates.matmul_gflops;
    devices.sort_by(|a, b| speed(b).total_cmp(&speed(a)));
    let mut found: Vec<Vec<Vec<usize>>> = Vec::new();
    for teams in (1..=devices.len() / count).rev() {
        let used = &devices[..teams * count];
        let alike: Vec<Vec<usize>> = used.chunks(count).map(<[usize]>::to_vec).collect();
        let unlike: Vec<Vec<usize>> =
            (0..teams).map(|team| used.iter().skip(team).step_by(teams).copied().collect()).collect();
        let classes = |teams: &Vec<Vec<usize>>| -> Vec<Vec<usize>> {
            teams.iter().map(|team| team.iter().map(|&device| pool.class_of(device)).collect()).collect()
        };
        // The search over many teams looks at fewer of them too.
        let is_all = teams == devices.len() / count;
        for grouping in [alike, unlike] {
            let differs = found.iter().all(|other| classes(other) != classes(&grouping));
            if differs && (is_all || pool.classes.len() > 1) {
                found.push(grouping);
            }
        }
    }
    found
}

/// The fastest pipelines over teams, taken apart.
fn pipelines(
    workload: &Workload,
    machine: &Machine,
    options: &Options,
    teams: &[Vec<usize>],
    count: usize,
    part: u64,
) -> Result<Vec<Mesh>> {
    let wanted = match &options.data {
        DataChoice::Shares(shares) => Some(shares.iter().sum()),
        _ => options.microbatches,
    };
    let of_step: Vec<&Batching> = workload
        .batchings
        .iter()
        .filter(|batching| batching.microbatches >= count)
        .filter(|batching| wanted.is_none_or(|wanted| wanted == batching.microbatches))
        .collect();
    if of_step.is_empty() {
        return Ok(Vec::new());
    }
    let batchings = of_step
        .iter()
        .map(|batching| Batching { microbatches: batching.microbatches / count, ..(*batching).clone() });
    let workload = Workload { batchings: batchings.collect(), ..workload.clone() };
    let virtual_machine = of_teams(machine, teams);
    let inner = Options {
        devices: options.devices.as_ref().map(|_| (0..teams.len()).collect()),
        microbatches: None,
        budgets: Vec::new(),
        data: DataChoice::Count(1),
        ..options.clone()
    };
    // What no pipeline over these teams can be is no mistake of anybody: one over others may be it.
    let Ok(space) = Space::new(&workload, &virtual_machine, &inner) else { return Ok(Vec::new()) };
    let mut judge = Judge::new(&space)?;
    let mut board = Board::default();
    let work = allowance(&space) / part;
    search(&mut judge, &mut board, work)?;
    if space.auto {
        make_schedules(&mut judge, &mut board, work)?;
    }
    let all = board.ranked(&space);
    let prices: Vec<Prices> =
        of_step.iter().map(|batching| Prices::new(&workload, batching, machine)).collect();
    let mut meshes = Vec::new();
    for timed in all.iter().take(MOST_PIPELINES) {
        let form = judge.form_of(timed);
        let batching = space.batchings[form.batching];
        let mut replicas: Vec<Vec<usize>> = (0..count)
            .map(|replica| timed.point.devices.iter().map(|&team| teams[team][replica]).collect())
            .collect();
        let speeds = |replicas: &[Vec<usize>]| -> Vec<(f64, f64)> {
            replicas.iter().map(|devices| pace(&prices[batching], devices, &timed.point.stages)).collect()
        };
        let shares = match &options.data {
            DataChoice::Shares(shares) => {
                if options.devices.is_none() {
                    replicas = by_shares(replicas, speeds, shares);
                }
                shares.clone()
            }
            _ => in_proportion(&speeds(&replicas), of_step[batching].microbatches),
        };
        let schedule = match &timed.made {
            Some(made) => Pattern::Made(made.schedule.clone()),
            None => Pattern::Named(form.schedule.name.clone(), form.stages() / form.ranks()),
        };
        meshes.push(Mesh { replicas, stages: timed.point.stages.clone(), schedule, shares });
    }
    Ok(meshes)
}

/// Seconds that the busiest device of a pipeline has for a microbatch, and those that one takes through all of it. Stages
/// beyond the devices are theirs again, in any order.
fn pace(prices: &Prices, devices: &[usize], stages: &[Range<usize>]) -> (f64, f64) {
    let mut busy = vec![0.0; devices.len()];
    for (stage, range) in stages.iter().enumerate() {
        let rank = stage % devices.len();
        busy[rank] += seconds(prices, devices[rank], range);
    }
    (busy.iter().copied().fold(0.0, f64::max), busy.iter().sum())
}

/// Microbatches for each pipeline, one after another to the one that will have ended first.
fn in_proportion(paces: &[(f64, f64)], microbatches: usize) -> Vec<usize> {
    let mut shares = vec![1; paces.len()];
    for _ in paces.len()..microbatches {
        let end = |replica: usize| paces[replica].0 * shares[replica] as f64 + paces[replica].1;
        let first = (0..paces.len()).min_by(|&a, &b| end(a).total_cmp(&end(b))).unwrap_or_default();
        shares[first] += 1;
    }
    shares
}

/// The replicas in such an order that the faster have the larger shares.
fn by_shares(
    replicas: Vec<Vec<usize>>,
    paces: impl Fn(&[Vec<usize>]) -> Vec<(f64, f64)>,
    shares: &[usize],
) -> Vec<Vec<usize>> {
    let paces = paces(&replicas);
    let mut fastest: Vec<usize> = (0..replicas.len()).collect();
    fastest.sort_by(|&a, &b| paces[a].0.total_cmp(&paces[b].0));
    let mut largest = fastest.clone();
    largest.sort_unstable();
    largest.sort_by_key(|&at| std::cmp::Reverse(shares[at]));
    let mut ordered = replicas.clone();
    for (&place, &replica) in largest.iter().zip(&fastest) {
        ordered[place] = replicas[replica].clone();
    }
    ordered
}

/// The plan that comes of several pipelines, improved by small changes; none if there is no such schedule, or if it does not
/// fit.
fn whole(
    workload: &Workload,
    machine: &Machine,
    options: &Options,
    mut mesh: Mesh,
) -> Result<Option<Candidate>> {
    let Some(mut best) = fixed(workload, machine, options, &mesh, WORK_OF_CHANGES)? else { return Ok(None) };
    let is_free = !matches!(options.data, DataChoice::Shares(_));
    let mut tries = WORK_OF_CHANGES / (1 + best.simulation.cells.len() as u64) / 100;
    while is_free && tries > 0 {
        mesh.stages = best.stages.clone();
        let ranks = mesh.replicas[0].len();
        mesh.replicas = best.devices.chunks(ranks).map(<[usize]>::to_vec).collect();
        let mut better = None;
        for shares in neighbours(&mesh.shares) {
            if tries == 0 {
                break;
            }
            tries -= 1;
            let other = Mesh { shares, ..mesh.clone() };
            let found = fixed(workload, machine, options, &other, 0)?;
            let seconds = |plan: &Candidate| plan.simulation.expected;
            if let Some(found) = found.filter(|found| seconds(found) < seconds(&best) * (1.0 - 1e-6)) {
                better = Some((found, other));
                break;
            }
        }
        let Some((found, other)) = better else { break };
        (best, mesh) = (found, other);
    }
    Ok(Some(best))
}

/// Shares with one microbatch more here and one fewer there.
fn neighbours(shares: &[usize]) -> Vec<Vec<usize>> {
    let count = shares.len();
    let pairs = (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
    let moved = pairs.filter(|&(from, to)| from != to && shares[from] > 1).map(|(from, to)| {
        let mut moved = shares.to_vec();
        moved[from] -= 1;
        moved[to] += 1;
        moved
    });
    moved.collect()
}

/// The plan with these shares, and with such other cuts and devices as so much work finds better.
fn fixed(
    workload: &Workload,
    machine: &Machine,
    options: &Options,
    mesh: &Mesh,
    work: u64,
) -> Result<Option<Candidate>> {
    let ranks = mesh.replicas[0].len();
    let replicas = mesh.shares.iter().map(|&share| mesh.schedule.schedule(ranks, share));
    // Some schedules want a number of microbatches that a share is not.
    let Some(replicas) = replicas.collect::<Option<Vec<_>>>() else { return Ok(None) };
    let given = workload.sharding.replicate(&replicas)?;
    improved(workload, machine, options, given, mesh.replicas.concat(), mesh.stages.clone(), work)
}

/// The plan with this schedule, and with such other cuts and devices as so much work finds better; none if it does not fit.
pub(super) fn improved(
    workload: &Workload,
    machine: &Machine,
    options: &Options,
    schedule: Schedule,
    devices: Vec<usize>,
    stages: Vec<Range<usize>>,
    work: u64,
) -> Result<Option<Candidate>> {
    let given = Options {
        devices: options.devices.as_ref().map(|_| devices.clone()),
        microbatches: None,
        schedule: ScheduleChoice::Given(schedule),
        budgets: Vec::new(),
        data: DataChoice::Count(1),
        ..options.clone()
    };
    let space = Space::new(workload, machine, &given)?;
    let mut judge = Judge::new(&space)?;
    let point = Point { form: 0, devices, stages };
    let timed = match work {
        0 => match judge.judge(&point, f64::INFINITY)? {
            Verdict::Fits(timed) => Some(timed),
            Verdict::Slow | Verdict::Unfit(_) => None,
        },
        work => improve(&mut judge, point, f64::INFINITY, work)?,
    };
    timed.map(|timed| candidate(&judge, &timed)).transpose()
}

/// A machine of which each device is a team.
pub(super) fn of_teams(machine: &Machine, teams: &[Vec<usize>]) -> Machine {
    let mut links = Vec::new();
    for (from, senders) in teams.iter().enumerate() {
        for (to, receivers) in teams.iter().enumerate().filter(|(to, _)| *to != from) {
            // Members of teams of equal sizes are those of one replica; else each may send to each.
            let is_even = senders.len() == receivers.len();
            let pairs = (0..senders.len()).flat_map(|from| (0..receivers.len()).map(move |to| (from, to)));
            let pairs = pairs.filter(|(from, to)| !is_even || from == to);
            let all: Vec<Link> = pairs.map(|(from, to)| machine.link(senders[from], receivers[to])).collect();
            let slowest = |of: fn(&Link) -> Option<f64>| all.iter().filter_map(of).reduce(f64::min);
            let link = Link {
                latency_us: all.iter().map(|link| link.latency_us).fold(0.0, f64::max),
                gb_s: slowest(|link| Some(link.gb_s)).unwrap_or(machine.link.gb_s),
                out_gb_s: slowest(|link| link.out_gb_s),
                into_gb_s: slowest(|link| link.into_gb_s),
            };
            links.push(LinkProfile { from, to, link });
        }
    }
    Machine {
        devices: teams.iter().map(|team| of_team(machine, team)).collect(),
        links,
        // How members of a team slow each other down is left to the simulation of the whole.
        slowdown: Vec::new(),
        ..machine.clone()
    }
}

/// A device that takes as long for its part of what a team does as the team takes for all, if each member has a part in
/// proportion to its speed.
fn of_team(machine: &Machine, team: &[usize]) -> DeviceProfile {
    let members: Vec<&DeviceProfile> = team.iter().map(|&device| &machine.devices[device]).collect();
    let first = members[0];
    let least = |of: fn(&DeviceProfile) -> Option<u64>| members.iter().filter_map(|m| of(m)).min();
    let mean = |of: &dyn Fn(&DeviceProfile) -> f64| -> f64 {
        members.iter().map(|member| of(member)).sum::<f64>() / members.len() as f64
    };
    let mut rates = first.rates;
    rates.matmul_gflops = mean(&|member| member.rates.matmul_gflops);
    rates.memory_gb_s = mean(&|member| member.rates.memory_gb_s);
    rates.launch_us = mean(&|member| member.rates.launch_us);
    rates.submit_us = mean(&|member| member.rates.submit_us);
    rates.barrier_us = mean(&|member| member.rates.barrier_us);
    let shapes = first.shapes.iter().filter_map(|shape| {
        let all: Option<Vec<&ShapeProfile>> =
            members.iter().map(|member| member.shape(&shape.shape)).collect();
        Some(of_shapes(&all?))
    });
    DeviceProfile {
        memory: least(|member| member.memory),
        max_binding: least(|member| member.max_binding),
        cores: members.iter().map(|member| member.cores).sum(),
        copy_engine: members.iter().all(|member| member.copy_engine),
        rates,
        shapes: shapes.collect(),
        ..first.clone()
    }
}

/// The mean speeds of several devices at one shape.
fn of_shapes(all: &[&ShapeProfile]) -> ShapeProfile {
    let count = all.len() as f64;
    let together = |seconds: &dyn Fn(&LayerProfile) -> f64, kind: &str| {
        let speeds = all.iter().filter_map(|shape| shape.layers.get(kind)).map(|layer| 1.0 / seconds(layer));
        count / speeds.sum::<f64>()
    };
    let kinds = all[0].layers.keys().filter(|kind| all.iter().all(|shape| shape.layers.contains_key(*kind)));
    let layers: BTreeMap<String, LayerProfile> = kinds
        .map(|kind| {
            let layer = LayerProfile {
                forward: together(&|layer| layer.forward, kind),
                input: together(&|layer| layer.input, kind),
                weight: together(&|layer| layer.weight, kind),
                backward: Some(together(&|layer| layer.times()[3], kind)),
            };
            (kind.clone(), layer)
        })
        .collect();
    let submits: Vec<f64> = all.iter().filter_map(|shape| shape.submit_us).collect();
    let submit_us = (!submits.is_empty()).then(|| submits.iter().sum::<f64>() / submits.len() as f64);
    ShapeProfile { submit_us, layers, ..all[0].clone() }
}
