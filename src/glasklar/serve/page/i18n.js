// All words of the page, in English and German; the browser's language decides.

const WORDS = {
  en: {
    chat: 'Chat', training: 'Training', try: 'Try', ask: 'Ask something', send: 'Send', stop: 'Stop',
    settings: 'Settings', thinking: 'Thinking', auto: 'as it likes', always: 'always', never: 'never',
    temperature: 'Temperature', seed: 'Seed', close: 'Close', inside: 'Look inside',
    hint: 'Click any piece of an answer to see what else the model had in mind.',
    thinkingNow: 'Thinking …', thought: (seconds, tokens) => `Thought for ${seconds} s, ${tokens} tokens`,
    copy: 'Copy', copied: 'Copied', again: 'Ask again',
    facts: (tokens, speed) => `${tokens} tokens · ${speed} tokens/s`,
    finish: { stop: 'finished', length: 'cut off at the limit' }, stopped: 'stopped', chance: 'by chance',
    lost: 'The connection broke off.', broken: 'The answer broke off before its end.', notCopied: 'Not allowed',
    insideText: 'At this place the model gave these pieces these probabilities.',
    gone: 'The server does not answer. Is glasklar still running? Trying again …',
    failed: 'Training failed', ready: 'The model is ready: talk to it.', howItWasMade: 'How it was made', empty: '(nothing)',
    waiting: 'Preparing', waitingStory: 'Problems are made up, and a tokenizer learns how to cut text into pieces.',
    stages: { pretrain: 'Pretraining', sft: 'Fine-tuning', rl: 'Reinforcement', distil: 'Distillation' },
    stageNumber: (k, name) => `Stage ${k} · ${name}`,
    headlines: {
      pretrain: 'It learns to read and to reckon', sft: 'It learns to answer questions',
      rl: 'It finds out that thinking pays', distil: 'It learns from a larger model',
    },
    stories: {
      pretrain: 'From nothing, the network learns to predict the next piece of text: made-up problems, some with worked thoughts.',
      sft: 'A limited number of examples shows how a conversation goes. Most of them answer at once, so the model does too, and is often wrong.',
      rl: 'Nobody shows it anything any more. It tries several answers to each new problem, and a checker says only right or wrong. Watch it begin to think first.',
      distil: 'It imitates the answers of a larger model.',
    },
    done: 'Done', doneHeadline: 'It has learned to think first', doneElse: 'The model is made', doneStory: 'Every figure below was measured on problems that it had never seen.',
    timing: (step, of, speed, left) => `step ${step} of ${of} · ${speed} tokens/s · ${left} left in this stage`,
    right: 'right on unseen problems', before: (share) => `before reinforcement ${share}`,
    spent: 'spent so far', mean: 'all tasks',
    loss: 'Loss while reading', correct: 'Right answers, and answers that think', length: 'Length of answers (tokens)',
    load: 'Load of the busiest expert (1 = even)', unseen: 'Right on unseen problems, while it learns',
    isCorrect: 'right', isThinking: 'thinks first', layer: (k) => `layer ${k}`,
    tasks: { sum: 'sums', letters: 'letters', equation: 'equations', scope: 'knowing its limits', sorting: 'sorting', countdown: 'Countdown', story: 'word problems' },
    examples: ['What is 3+4-2+6?', 'How many e are in beetle?', 'Solve 3x+4=19', 'Was ist 7-2+5+1?', 'What can you do?'],
  },
  de: {
    chat: 'Gespräch', training: 'Training', try: 'Zum Beispiel', ask: 'Frag etwas', send: 'Senden', stop: 'Halt',
    settings: 'Einstellungen', thinking: 'Nachdenken', auto: 'wie es will', always: 'immer', never: 'nie',
    temperature: 'Temperatur', seed: 'Startwert', close: 'Schließen', inside: 'Hineinsehen',
    hint: 'Ein Klick auf ein Stück der Antwort zeigt, was das Modell noch im Sinn hatte.',
    thinkingNow: 'Denkt nach …', thought: (seconds, tokens) => `${seconds} s nachgedacht, ${tokens} Token`,
    copy: 'Kopieren', copied: 'Kopiert', again: 'Noch einmal',
    facts: (tokens, speed) => `${tokens} Token · ${speed} Token/s`,
    finish: { stop: 'zu Ende', length: 'am Limit abgebrochen' }, stopped: 'angehalten', chance: 'Zufall',
    lost: 'Die Verbindung ist abgerissen.', broken: 'Die Antwort brach vor ihrem Ende ab.', notCopied: 'Nicht erlaubt',
    insideText: 'An dieser Stelle gab das Modell diesen Stücken diese Wahrscheinlichkeiten.',
    gone: 'Der Server antwortet nicht. Läuft glasklar noch? Neuer Versuch …',
    failed: 'Das Training ist gescheitert', ready: 'Das Modell ist fertig: sprich mit ihm.', howItWasMade: 'Wie es entstand', empty: '(nichts)',
    waiting: 'Vorbereitung', waitingStory: 'Aufgaben werden ausgedacht, und ein Tokenizer lernt, Text in Stücke zu teilen.',
    stages: { pretrain: 'Vortraining', sft: 'Feinabstimmung', rl: 'Verstärkung', distil: 'Destillation' },
    stageNumber: (k, name) => `Stufe ${k} · ${name}`,
    headlines: {
      pretrain: 'Es lernt lesen und rechnen', sft: 'Es lernt, auf Fragen zu antworten',
      rl: 'Es merkt, dass Nachdenken sich lohnt', distil: 'Es lernt von einem größeren Modell',
    },
    stories: {
      pretrain: 'Von nichts an lernt das Netz, das nächste Stück Text vorherzusagen: ausgedachte Aufgaben, manche mit Rechenweg.',
      sft: 'Eine begrenzte Zahl von Beispielen zeigt, wie ein Gespräch geht. Die meisten antworten sofort; so tut es das Modell auch, und liegt oft falsch.',
      rl: 'Niemand macht ihm mehr etwas vor. Es versucht mehrere Antworten auf jede neue Aufgabe, und ein Prüfer sagt nur: richtig oder falsch. Sieh zu, wie es anfängt, erst nachzudenken.',
      distil: 'Es ahmt die Antworten eines größeren Modells nach.',
    },
    done: 'Fertig', doneHeadline: 'Es hat gelernt, erst nachzudenken', doneElse: 'Das Modell ist gebaut', doneStory: 'Alle Zahlen sind an Aufgaben gemessen, die es nie gesehen hatte.',
    timing: (step, of, speed, left) => `Schritt ${step} von ${of} · ${speed} Token/s · noch ${left} in dieser Stufe`,
    right: 'richtig bei ungesehenen Aufgaben', before: (share) => `vor der Verstärkung ${share}`,
    spent: 'bisher gebraucht', mean: 'alle Aufgaben',
    loss: 'Verlust beim Lesen', correct: 'Richtige Antworten, und Antworten mit Nachdenken', length: 'Länge der Antworten (Token)',
    load: 'Last des meistgefragten Experten (1 = gleichmäßig)', unseen: 'Richtig bei ungesehenen Aufgaben, während es lernt',
    isCorrect: 'richtig', isThinking: 'denkt erst nach', layer: (k) => `Schicht ${k}`,
    tasks: { sum: 'Summen', letters: 'Buchstaben', equation: 'Gleichungen', scope: 'eigene Grenzen kennen', sorting: 'Sortieren', countdown: 'Countdown', story: 'Textaufgaben' },
    examples: ['Was ist 3+4-2+6?', 'Wie viele n sind in Banane?', 'Löse 2x-5=9', 'What is 7-2+5+1?', 'Was kannst du?'],
  },
};

export const LANGUAGE = navigator.language.toLowerCase().startsWith('de') ? 'de' : 'en';
export const words = WORDS[LANGUAGE];
export const share = new Intl.NumberFormat(LANGUAGE, { style: 'percent', maximumFractionDigits: 0 });
export const tenths = new Intl.NumberFormat(LANGUAGE, { style: 'percent', minimumFractionDigits: 1, maximumFractionDigits: 1 });
export const number = new Intl.NumberFormat(LANGUAGE, { maximumFractionDigits: 1 });

// Fills in every element that names its words: data-text, data-placeholder, data-label.
export function translate(root) {
  document.documentElement.lang = LANGUAGE;
  for (const element of root.querySelectorAll('[data-text]')) element.textContent = words[element.dataset.text];
  for (const element of root.querySelectorAll('[data-placeholder]')) element.placeholder = words[element.dataset.placeholder];
  for (const element of root.querySelectorAll('[data-label]')) element.setAttribute('aria-label', words[element.dataset.label]);
}

export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, '0')}`;
}
