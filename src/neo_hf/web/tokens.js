// A click on a token of the answer, with its place in the conversation.
element.addEventListener("click", event => {
  const button = event.target.closest("button[data-token]");
  if (button) trigger("select", { token: Number(button.dataset.token) });
});
