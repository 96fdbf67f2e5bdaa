// The life of a run: what happens now, how far it is, and how accuracy on unseen problems rises.

import { chart } from './charts.js';
import { find, make } from './dom.js';
import { clock, number, precise, share, short, words } from './i18n.js';

export class Training {
  constructor() {
    this.restart();
  }

  restart() {
    this.steps = []; // of all stages; `part` counts the stages, since two may bear one name
    this.evaluations = [];
    this.parts = 0;
    this.next = 0;
  }

  // Takes in what /run/metrics said.
  take({ lines, next }) {
    if (next < this.next) this.restart();
    if (lines.length > next - this.next) this.restart();
    this.next = next;
    for (const line of lines) {
      if (line.evaluation) this.evaluations.push(line);
      else this.steps.push({ ...line, part: this.part(line) });
    }
  }

  part(line) {
    const last = this.steps.at(-1);
    if (!last || last.stage !== line.stage || line.step <= last.step) this.parts += 1;
    return this.parts;
  }

  // `now`: what /run/status said, `progress`: what /run/progress said.
  show(now, progress) {
    const last = this.steps.at(-1), { state, error } = now;
    if (state === 'failed') this.hero(words.failed, words.failed, error, 0, '');
    else if (state === 'serving') this.hero(words.doneStage, this.outcome(), words.doneStory, 1, '');
    else if (!last) this.hero(words.waiting, words.waiting, words.waitingStory, 0, '');
    else this.now(last);
    if (progress) {
      this.stages(progress.stages, state === 'training');
      this.figures(progress, state === 'serving');
    }
    this.scores();
    this.samples();
    this.charts();
  }

  now(last) {
    const timing = words.timing(last.step, last.of, short.format(last.tokens_per_second ?? 0), clock(last.seconds_left ?? 0));
    const name = words.stageNumber(last.part, words.stages[last.stage] ?? last.stage);
    this.hero(name, words.headlines[last.stage] ?? name, words.stories[last.stage] ?? '', last.step / last.of, timing);
  }

  // Says that thinking was learned only where reinforcement made it better.
  outcome() {
    const before = this.beforeReinforcement(), after = this.evaluations.findLast((line) => line.evaluation === 'after rl');
    return after?.mean?.greedy > before?.mean?.greedy ? words.doneHeadline : words.doneElse;
  }

  // The last evaluation of the tasks before reinforcement began, or of all where there is none.
  beforeReinforcement() {
    const began = this.evaluations.findIndex((line) => line.evaluation === 'rl step' || line.evaluation === 'after rl');
    return this.evaluations.slice(0, began < 0 ? undefined : began).findLast((line) => line.tasks);
  }

  hero(stage, headline, story, done, timing) {
    const texts = { stage, headline, story, timing };
    for (const [id, text] of Object.entries(texts)) if (find(id).textContent !== text) find(id).textContent = text;
    find('progress').style.width = `${100 * done}%`;
    find('progress').parentElement.setAttribute('aria-valuenow', String(Math.round(100 * done)));
    find('progress').parentElement.hidden = done === 1;
    find('timing').hidden = !timing;
  }

  stages(stages, running) {
    const at = stages.findLastIndex((stage) => stage.done);
    const entries = stages.map((stage, k) => {
      const entry = make('li', { textContent: words.stages[stage.kind] ?? stage.kind });
      const now = running && k === at && stage.done < stage.steps;
      entry.className = now ? 'now' : stage.done >= stage.steps || (!running && stage.done) ? 'past' : '';
      if (now) entry.setAttribute('aria-current', 'step');
      entry.style.setProperty('--done', `${(100 * stage.done) / stage.steps}%`);
      return entry;
    });
    find('stages').replaceChildren(...entries);
  }

  figures({ seconds, seconds_left: left, tokens, joules, usd, counted }, finished) {
    const kind = counted ? words.energyCounted : words.energyEstimate;
    const money = usd < 1 ? words.cents(precise.format(100 * usd)) : words.dollars(number.format(usd));
    const pairs = [
      [finished ? words.figure.timeAll : words.figure.time, clock(seconds)],
      ...(finished || left === null ? [] : [[words.figure.left, clock(left)]]),
      [words.figure.tokens, short.format(tokens)],
      [finished ? words.figure.energyAll : words.figure.energy, energyOf(joules), kind],
      [words.figure.cost, money, kind],
    ];
    find('figures').replaceChildren(...(seconds ? pairs : []).map(([name, value, note]) => make('div', {}, name,
      make('b', {}, value, note ? make('small', { className: 'muted', textContent: ` ${note}` }) : null))));
  }

  scores() {
    const after = this.evaluations.findLast((line) => line.tasks);
    const before = this.beforeReinforcement();
    find('scores').replaceChildren();
    if (!after) return;
    const reinforced = before && after !== before;
    for (const [name, scores] of [['mean', after.mean], ...Object.entries(after.tasks)]) {
      if (scores?.greedy === undefined) continue;
      const earlier = name === 'mean' ? before?.mean : before?.tasks?.[name];
      const card = make('div', { className: 'card' },
        make('span', { className: 'muted', textContent: name === 'mean' ? words.mean : words.tasks[name] ?? name }),
        make('b', { textContent: share.format(scores.greedy) }),
        make('span', { className: 'muted', textContent: reinforced && earlier ? words.before(share.format(earlier.greedy)) : words.right }));
      find('scores').append(card);
    }
  }

  // What the model says to problems that it has never seen, as of the last evaluation.
  samples() {
    const line = this.evaluations.findLast((one) => one.examples);
    if (!line || line === this.sampled) return;
    this.sampled = line;
    const stage = line.evaluation.replace('after ', '');
    const when = line.evaluation === 'rl step' ? words.sampleStep(line.step) : words.sampleAfter(words.stages[stage] ?? stage);
    const shown = Object.values(line.examples).flat().map((example) => make('div', { className: 'sample' },
      make('p', { className: 'q', textContent: example.question }),
      example.thought ? make('p', { className: 't', textContent: example.thought }) : null,
      make('p', {}, example.answer || words.empty, make('span', { className: `verdict ${example.correct ? 'good' : ''}`, textContent: example.correct ? words.sampleRight : words.sampleWrong }))));
    find('samples').replaceChildren(make('h3', {}, words.samples, make('span', { className: 'muted', textContent: when })), make('div', { className: 'sample-list' }, ...shown));
  }

  charts() {
    const shown = [];
    const reading = this.steps.filter((line) => line.stage !== 'rl');
    const acting = this.steps.filter((line) => line.stage === 'rl');
    const loaded = this.steps.filter((line) => line.load_max_mean?.length && line.tokens);
    if (acting.length) shown.push(...this.reinforcement(acting));
    if (reading.length) {
      const points = reading.map((line, k) => [k + 1, line.loss, line.part]);
      shown.push(chart([{ name: words.loss, points, smooth: true }], { title: words.loss, zero: true, label: '' }));
    }
    if (loaded.length) {
      const layers = Math.min(...loaded.map((line) => line.load_max_mean.length));
      const series = Array.from({ length: Math.min(4, layers) }, (_, k) => ({
        name: words.layer(k + 1), smooth: true, points: loaded.map((line, i) => [i + 1, line.load_max_mean[k], line.part]),
      }));
      shown.push(chart(series, { title: words.load, top: 1.5 }));
    }
    find('charts').replaceChildren(...shown);
  }

  reinforcement(acting) {
    const over = (name) => acting.filter((line) => name in line).map((line) => [line.step, line[name]]);
    const watched = this.evaluations.filter((line) => line.evaluation === 'rl step');
    const start = this.beforeReinforcement();
    const tasks = Object.keys(watched[0]?.tasks ?? {});
    const unseen = tasks.map((name) => ({
      name: words.tasks[name] ?? name,
      points: [...(start?.tasks[name] ? [[0, start.tasks[name].greedy]] : []), ...watched.filter((line) => line.tasks[name]).map((line) => [line.step, line.tasks[name].greedy])],
    }));
    const shown = [];
    if (unseen.length) shown.push(chart(unseen, { title: words.unseen, percent: true }));
    shown.push(chart(
      [{ name: words.isCorrect, points: over('correct'), smooth: true }, { name: words.isThinking, points: over('thinking_share'), smooth: true }],
      { title: words.correct, percent: true },
    ));
    shown.push(chart([{ name: words.length, points: over('length'), smooth: true }], { title: words.length, zero: true }));
    return shown;
  }
}

const energyOf = (joules) => (joules < 3.6e5 ? words.wh(precise.format(joules / 3600)) : words.kwh(precise.format(joules / 3.6e6)));
