// The secret key of this tab's session. sessionStorage survives a reload and is not shared with other tabs.
window.neoSession = () => {
  let key = sessionStorage.getItem("neo-session");
  if (!key) {
    key = [...crypto.getRandomValues(new Uint8Array(16))].map(byte => byte.toString(16).padStart(2, "0")).join("");
    sessionStorage.setItem("neo-session", key);
  }
  return key;
};
