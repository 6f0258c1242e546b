// Questions to token ids: ChatML, with an image as `<img>`, an `<IMG_CONTEXT>` per visual token and `</img>`.

import { Tokenizer } from "@huggingface/tokenizers";

// The tokenizer's normalizer drops this mark, after it has looked for special tokens (see chat_template_neo.py).
const MARK = "\ufdd0";

export class Prompter {
  constructor(tokenizerJson, tokenizerConfig) {
    this.tokenizer = new Tokenizer(tokenizerJson, tokenizerConfig);
    this.special = tokenizerJson.added_tokens.filter((token) => token.special).map((token) => token.content);
  }

  /** Token ids of a question about images of so many visual tokens each, up to where the answer begins. */
  ask(question, visualTokens) {
    const images = visualTokens.map((n) => `<img>${"<IMG_CONTEXT>".repeat(n)}</img>\n`).join("");
    const text = `<|im_start|>user\n${images}${this.mark(question)}<|im_end|>\n<|im_start|>assistant\n`;
    return this.tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  /** What people write is plain text, special tokens included. */
  mark(text) {
    const escaped = this.special.map((token) => token.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    return text.replace(new RegExp(escaped.join("|"), "g"), (token) => token[0] + MARK + token.slice(1));
  }

  decode(ids) {
    return ids.length ? this.tokenizer.decode(ids, { skip_special_tokens: true }) : "";
  }
}
